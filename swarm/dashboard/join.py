"""How to join the swarm that is shown: an invite, and commands that are safe to paste. Pure.

A model's name is a stranger's claim: what is not a plain name never becomes part of a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

from routing.addresses import is_public
from routing.invites import MAX_BOOTSTRAPS, Invite
from swarm.dashboard.schemas import Join, JoinCommand, ModelView

INSTALL: Final = "pip install hiveswarm"
MAX_COMMANDS: Final = 20
_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]*", re.ASCII)


def join(network: str, addresses: tuple[str, ...], models: Iterable[ModelView]) -> Join:
    """Raises CallerError where the addresses do not fit into an invite."""
    invite = Invite(network=network, bootstraps=addresses[:MAX_BOOTSTRAPS]).to_link()
    in_need = sorted(models, key=lambda view: (view.healthy, view.replication, view.name))
    note = ""
    if not any(map(is_public, addresses)):
        note = (
            "The invite holds no public IP address: it works where the entry nodes' addresses do, such as on this "
            "machine or in this local network."
        )
    return Join(
        network=network,
        invite=invite,
        addresses=list(addresses),
        install=INSTALL,
        commands=[_command(view, invite) for view in in_need[:MAX_COMMANDS]],
        note=note,
    )


def _command(view: ModelView, invite: str) -> JoinCommand:
    plain = _PLAIN.fullmatch(view.name) is not None
    name, note = (view.name, _note(view)) if plain else ("MODEL", "Put the model's name or folder for MODEL.")
    return JoinCommand(
        model_id=view.model_id,
        model_name=view.name,
        command=f"swarm join {shlex.quote(name)} --invite {shlex.quote(invite)}",
        note=note,
    )


def _note(view: ModelView) -> str:
    if view.gaps:
        missing = ", ".join(f"{start}:{end}" for start, end in view.gaps[:8])
        return f"Nobody serves blocks {missing}: a new peer takes those first."
    if view.single:
        return "Some blocks have a single holder: a new peer takes those first."
    return ""
