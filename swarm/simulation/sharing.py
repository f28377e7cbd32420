"""How users share peers within a second: rates and waits that fit each other, for everybody at once.

Owns the arithmetic, as arrays with a row for each user and one for each peer. Knows no session and no route: users tell
what they have under way, and are told how far it went.

    U  users    H  hops of a route, as many as the longest one has    L  lines: every peer's steps, then their prompts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from routing.flow import BATCH
from swarm.simulation.world import Peer

SETTLING: Final = 4
"""Rounds in which waits and rates come to fit each other, each second."""
SLOWDOWN_MAX: Final = 1000.0
TOKEN: Final = (1 + (BATCH - 1) / BATCH) / BATCH
"""Of the time of a step by itself, what a token takes of a peer that serves BATCH of them together."""


class Sharing:
    """Guards what every user has under way, and how long works take at every peer's lines."""

    def __init__(self, users: int, peers: int) -> None:
        self._peers = peers
        self._alone_s_UH = np.zeros((users, 1))
        """Of a step of one position at each hop."""
        self._line_UH = np.zeros((users, 1), dtype=np.intp)
        self._trips_s_U = np.ones(users)
        self.tokens_U = np.ones(users)
        """Per forward."""
        self.left_U = np.zeros(users)
        """Positions of what is under way; 0: nothing is."""
        self.opening_s_U = np.zeros(users)
        """Of the next second, what passes before it goes on."""
        self._slowdown_L = np.ones(2 * peers)

    def begin(self, user: int, left: float, tokens: int, trips_s: float, hops: Sequence[tuple[Peer, int]]) -> None:
        """This is what the user has under way, at `hops` with their blocks, `tokens` in a forward."""
        missing = len(hops) - self._line_UH.shape[1]
        if missing > 0:
            self._line_UH = np.pad(self._line_UH, ((0, 0), (0, missing)))
            self._alone_s_UH = np.pad(self._alone_s_UH, ((0, 0), (0, missing)))
        first = self._peers if tokens > 1 else 0
        self._line_UH[user, : len(hops)] = [first + peer.row for peer, _ in hops]
        self._alone_s_UH[user] = 0.0
        self._alone_s_UH[user, : len(hops)] = [blocks * peer.decode_s for peer, blocks in hops]
        self._trips_s_U[user], self.tokens_U[user] = trips_s, tokens
        self.left_U[user] = left

    def idle(self, row: int) -> None:
        """Another peer is there."""
        self._slowdown_L[[row, self._peers + row]] = 1.0

    def second(self, peers: Iterable[Peer]) -> np.ndarray:
        """One second goes by; returns the positions that everybody gets through if there are so many.

        Steps and prompts share a peer: neither gets less than half of it if it wants that, and what is asked for
        settles at what can be done.
        """
        n, (busy,) = self._peers, np.nonzero(self.left_U)
        alone_s_UH, line_UH = self._alone_s_UH[busy], self._line_UH[busy]
        tokens_U, trips_s_U, slowdown_L = self.tokens_U[busy], self._trips_s_U[busy], self._slowdown_L
        longer_U = 1 + (tokens_U - 1) / BATCH
        excess_L = np.ones(2 * n)
        rate_U = np.zeros(len(busy))
        for _ in range(SETTLING):
            rate_U = tokens_U / (trips_s_U + longer_U * (alone_s_UH * slowdown_L[line_UH]).sum(1))
            asked_UH = rate_U[:, None] * alone_s_UH * TOKEN
            asked_L: np.ndarray = np.bincount(line_UH.ravel(), asked_UH.ravel(), 2 * n)
            of_steps, of_prompts = 1 - np.minimum(0.5, asked_L[n:]), np.maximum(0.5, 1 - asked_L[:n])
            used_L = asked_L / np.concatenate((of_steps, of_prompts))
            excess_L = np.maximum(1.0, used_L)
            slowdown_L = np.clip(slowdown_L * np.sqrt(np.clip(used_L, 0.5, 2.0)), 1.0, SLOWDOWN_MAX)
        self._slowdown_L = slowdown_L
        slowdowns = list(zip(slowdown_L[:n].tolist(), slowdown_L[n:].tolist(), strict=True))
        for peer in peers:
            peer.slowdowns = slowdowns[peer.row]
        done_U = np.zeros(len(self.left_U))
        done_U[busy] = rate_U / np.where(alone_s_UH > 0, excess_L[line_UH], 1.0).max(1, initial=1.0)
        done_U *= 1 - self.opening_s_U
        self.opening_s_U[:] = 0.0
        return done_U
