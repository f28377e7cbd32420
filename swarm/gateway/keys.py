"""Who may ask, and how often.

Owns API keys (only their hashes are kept) and each key's budget of requests. Pure: the clock is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from routing.errors import CallerError

MAX_KEY_CHARACTERS = 512
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANYBODY = "anybody"
"""The owner of everything at a gateway without keys."""


@dataclass(slots=True, kw_only=True)
class Account:
    """One key's holder. Sessions and prefixes are reused only within one."""

    name: str
    digest: bytes
    requests_per_minute: float | None = None
    _tokens: float = field(default=0.0, init=False)
    _as_of_s: float | None = field(default=None, init=False)

    def wait_s(self, now_s: float) -> float:
        """0 where a request is within the budget, which it is taken from; else seconds until one would be.

        A token bucket: a minute's requests may come at once, no more.
        """
        if self.requests_per_minute is None:
            return 0.0
        full, rate = max(1.0, self.requests_per_minute), self.requests_per_minute / 60
        self._tokens = full if self._as_of_s is None else min(full, self._tokens + (now_s - self._as_of_s) * rate)
        self._as_of_s = now_s
        if self._tokens < 1.0:
            return (1.0 - self._tokens) / rate
        self._tokens -= 1.0
        return 0.0


class Keys:
    """All accounts. Without any, everybody is let in as one."""

    def __init__(self, accounts: Sequence[Account], *, requests_per_minute: float | None = None) -> None:
        """`requests_per_minute`: of accounts that set none."""
        names = [account.name for account in accounts]
        if len({*names}) < len(names):
            raise CallerError("two API keys have the same name", hint="give each line of the file its own name")
        self.needed = bool(accounts)
        self._accounts = list(accounts) or [Account(name=ANYBODY, digest=b"")]
        for account in self._accounts:
            if account.requests_per_minute is None:
                account.requests_per_minute = requests_per_minute

    def find(self, authorization: str | None) -> Account | None:
        """Whose the `Authorization` header is; None: nobody's. Takes as long for every key of a length."""
        if not self.needed:
            return self._accounts[0]
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or len(key) > MAX_KEY_CHARACTERS:
            return None
        digest, found = hash_key(key.strip()), None
        for account in self._accounts:  # all of them, so that the time says nothing about which
            if hmac.compare_digest(account.digest, digest):
                found = account
        return found


def hash_key(key: str) -> bytes:
    """SHA-256: enough for keys that are long and random, and quick enough for each request."""
    return hashlib.sha256(key.encode()).digest()


def accounts_of(keys: Sequence[str], file: Path | None) -> list[Account]:
    """From `--api-key` and `--api-keys`. Raises CallerError."""
    accounts = []
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or len(key) > MAX_KEY_CHARACTERS or key.split() != [key]:
            raise CallerError(
                f"an API key has 16 to {MAX_KEY_CHARACTERS} characters and no spaces",
                hint="make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
        accounts.append(Account(name=f"key-{number}", digest=hash_key(key)))
    return accounts + ([] if file is None else read_keys(file))


def read_keys(file: Path) -> list[Account]:
    """One account a line: `name sha256-of-the-key [requests-per-minute]`; # begins a comment. Raises CallerError."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CallerError(f"{file} cannot be read: {error}") from error
    accounts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            name, digest, *rate = words
            limit = float(rate[0]) if len(rate) == 1 else None
            if len(rate) > 1 or not NAME.fullmatch(name) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
                raise ValueError
            if limit is not None and not 0 < limit < 1e9:
                raise ValueError
        except ValueError:
            raise CallerError(
                f"line {number} of {file} is no key",
                hint="write `name sha256 [requests-per-minute]`; the hash comes from: printf %s KEY | sha256sum",
            ) from None
        accounts.append(Account(name=name, digest=bytes.fromhex(digest), requests_per_minute=limit))
    if not accounts:
        raise CallerError(f"{file} holds no key", hint="one a line: name sha256 [requests-per-minute]")
    return accounts
