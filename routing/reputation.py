"""Failures turned into back-off: twice as long each time, forgotten in time, never for ever.

Owns which peers to leave alone for now, and why. A busy peer has not failed: it is left alone for as long as it asked,
within reason, and keeps its good name.
"""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from routing.ids import PeerId

BACKOFF_S_MIN: Final = 2.0
"""After the first failure: shorter than a client waits for missing blocks, so that a blip of an only holder heals."""
BACKOFF_S_MAX: Final = 300.0
STRIKE_HALF_LIFE_S: Final = 300.0
ANSWERING_BACKOFF_S_MAX: Final = 30.0
"""Of a peer that did not answer and does again. Not at once: its link may come and go."""
BUSY_S_MAX: Final = 30.0
"""A peer that asks for a longer pause than this gets this."""
MAX_PEERS: Final = 20_000
_STRIKES_MAX: Final = 16.0
_STRIKES_MIN: Final = 0.25


class Opinion(NamedTuple):
    """What stands against a peer."""

    peer_id: PeerId
    strikes: float
    backoff_s: float
    """It is left alone for so long yet, and who is gone until something is heard of it."""
    age_s: float
    """Since it failed last."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    strikes: float = 0.0
    updated_at_s: float = 0.0
    backed_off_until_s: float = 0.0
    busy_until_s: float = 0.0
    unreachable: bool = False
    unheard: bool = False
    """Nothing was heard of it since it was gone."""
    late: bool = False
    reason: str = ""

    def left_alone_at(self, now_s: float) -> bool:
        return self.backed_off_until_s > now_s or self.unheard

    def strikes_at(self, now_s: float) -> float:
        age_s = max(0.0, now_s - self.updated_at_s)
        return float(self.strikes * 0.5 ** (age_s / STRIKE_HALF_LIFE_S))


class Reputation:
    """Guards the verdicts on at most MAX_PEERS peers; the one heard of longest ago is forgotten first."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._records: dict[PeerId, _Record] = {}

    def on_failure(
        self, peer: PeerId, now_s: float, reason: str, *, unreachable: bool = False, late: bool = False
    ) -> None:
        """Back off from a peer that erred, died or kept silent; `reason` is for people, `unreachable` says that all
        that stands against it is that it did not answer, `late` that it may yet: nothing speaks for its end.

        What fails while the peer is backed off from already (its other sessions, say) is the same failure. Who is gone,
        unreachable and not late, is left alone until something is heard of it, an answer or a new record: the records
        of the dead outlive them by up to a lifetime, and who tried all of them again and again would never end.
        """
        known = self._records.get(peer, _CLEAN)
        if known.backed_off_until_s > now_s:
            return
        gone = unreachable and (known.unheard or not late)  # silence says nothing new of who was gone
        strikes = min(known.strikes_at(now_s) + 1, _STRIKES_MAX)
        backoff_s = min(BACKOFF_S_MIN * 2.0 ** (strikes - 1), BACKOFF_S_MAX)
        failed = replace(
            known,
            strikes=strikes,
            updated_at_s=now_s,
            backed_off_until_s=now_s + backoff_s,
            unreachable=unreachable,
            unheard=gone,
            late=late and not gone,
            # It may quote the peer, and ends up on somebody's terminal.
            reason="".join(c if c.isprintable() else "?" for c in reason[:200]),
        )
        self._put(peer, failed)

    def on_answer(self, peer: PeerId, now_s: float, *, needed: bool = False) -> None:
        """The peer answers a small message. Where it is left alone for not answering, that ends early, and at once when
        nobody else has what is `needed`; its failures still count."""
        known = self._records.get(peer, _CLEAN)
        if known.unreachable and known.left_alone_at(now_s):
            until_s = now_s if needed else known.updated_at_s + ANSWERING_BACKOFF_S_MAX
            until_s = min(known.backed_off_until_s, until_s)
            self._records[peer] = replace(known, backed_off_until_s=until_s, unheard=False)

    @property
    def unheard(self) -> Set[PeerId]:
        """Who were gone, and nothing was heard of them since."""
        return {peer for peer, known in self._records.items() if known.unheard}

    def on_record(self, peer: PeerId, made_at_s: float) -> None:
        """The peer announced itself then, by its own clock: if later, it may be tried once its back-off is over. A
        clock that is ahead costs a try of the dead, one that is behind a while.
        """
        known = self._records.get(peer, _CLEAN)
        if known.unheard and made_at_s > known.updated_at_s:
            self._records[peer] = replace(known, unheard=False)

    def silent(self, now_s: float) -> set[PeerId]:
        """Peers that are left alone only because they did not answer."""
        return {peer for peer, known in self._records.items() if known.unreachable and known.left_alone_at(now_s)}

    def late(self, now_s: float) -> set[PeerId]:
        """Those of the silent that may be alive, as far as is known."""
        return {peer for peer in self.silent(now_s) if self._records[peer].late}

    def on_busy(self, peer: PeerId, retry_after_s: float, now_s: float) -> None:
        """A healthy peer without room asks to be left alone for a while."""
        known = self._records.get(peer, _CLEAN)
        pause_s = min(max(retry_after_s, 0.0), BUSY_S_MAX)
        self._put(peer, replace(known, busy_until_s=now_s + pause_s))

    def on_success(self, peer: PeerId, now_s: float) -> None:
        """The peer did its work: any pause ends, and half of what it did wrong is forgiven."""
        known = self._records.pop(peer, _CLEAN)
        strikes = known.strikes_at(now_s) / 2
        if strikes >= _STRIKES_MIN:
            self._records[peer] = _Record(strikes=strikes, updated_at_s=now_s)

    def backed_off(self, now_s: float) -> dict[PeerId, str]:
        """Peers that must not be used now because they failed, each with the reason and the seconds left."""
        return {
            peer: f"backed off for {record.backed_off_until_s - now_s:.0f} s after: {record.reason}"
            if record.backed_off_until_s > now_s
            else f"not heard of since: {record.reason}"
            for peer, record in self._records.items()
            if record.left_alone_at(now_s)
        }

    def opinions(self, now_s: float, count: int) -> list[Opinion]:
        """Of the `count` peers heard of last, those against whom something stands; the latest first."""
        latest = itertools.islice(reversed(self._records.items()), count)
        return [
            Opinion(
                peer,
                record.strikes_at(now_s),
                max(0.0, record.backed_off_until_s - now_s),
                max(0.0, now_s - record.updated_at_s),
                record.reason,
            )
            for peer, record in latest
            if record.strikes_at(now_s) >= _STRIKES_MIN
        ]

    def busy(self, now_s: float) -> frozenset[PeerId]:
        """Peers that said that they have no room now."""
        return frozenset(peer for peer, record in self._records.items() if record.busy_until_s > now_s)

    def _put(self, peer: PeerId, record: _Record) -> None:
        self._records.pop(peer, None)
        if len(self._records) >= self._max_peers:
            del self._records[next(iter(self._records))]
        self._records[peer] = record


_CLEAN: Final = _Record()
