"""Which adapter a name means, among those that peers announce.

Owns the choice, and that nobody is given another one than was meant: whoever likes may announce any name, so one that
stands for several adapters must be told apart by the digest of its content.
"""

from __future__ import annotations

from collections.abc import Iterable

from routing.errors import CallerError
from routing.records import Announcement, HostedAdapter, check_adapter_name


def find_adapter(announcements: Iterable[Announcement], asked: str) -> HostedAdapter | None:
    """The adapter called `asked`, "NAME" or "NAME@DIGEST" with the first digits of its digest; None where nobody
    announces it. Raises CallerError for what is no such name, and where it means several."""
    name, at, digits = asked.partition("@")
    check_adapter_name(name)
    if at and not (digits and digits.isalnum()):
        raise CallerError(f"{asked!r} is no adapter", hint="write NAME, or NAME@ and the first digits of its digest")
    hosted = {adapter for peer in announcements for adapter in peer.adapters if adapter.name == name}
    found = sorted(adapter for adapter in hosted if adapter.digest.hex().startswith(digits.lower()))
    if len(found) > 1:
        raise CallerError(
            f"peers host {len(found)} different adapters called {name}", hint=f"say which: {', '.join(map(str, found))}"
        )
    return found[0] if found else None
