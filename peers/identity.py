"""A node's identity file: created once, readable by its owner only, an Ed25519 key that libp2p understands.

Owns the file; the key's meaning is in `routing.identity`.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from peers.errors import InsecureIdentity
from routing.errors import CallerError
from routing.identity import SigningKey, identity_file_bytes, key_from_identity_file


def load_identity(path: Path) -> SigningKey:
    """The key in `path`, made now when there is none. Raises InsecureIdentity."""
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    key = SigningKey.from_seed(secrets.token_bytes(32))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name) as file:  # mode 0600 from the start
            file.write(identity_file_bytes(key))
            file.flush()
            os.link(file.name, path)  # whole or not at all, and never over another's
    except FileExistsError:  # another process made it just now
        return _read(path)
    except OSError as error:
        raise InsecureIdentity(f"{path} cannot be created: {error.strerror}") from error
    return key


def _read(path: Path) -> SigningKey:
    try:
        with path.open("rb") as file:
            if (mode := stat.S_IMODE(os.fstat(file.fileno()).st_mode)) & 0o077:
                raise InsecureIdentity(f"{path} can be read by others (mode {mode:04o})", hint=f"run: chmod 600 {path}")
            data = file.read(4096)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InsecureIdentity(f"{path} cannot be read: {error.strerror}") from error
    try:
        return key_from_identity_file(data)
    except CallerError as error:
        raise InsecureIdentity(
            f"{path} holds no Ed25519 identity: {error}", hint="move it away; a new one is made at the next start"
        ) from error
