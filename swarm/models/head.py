"""One head for all threads that generate: rows that wait for it while it is busy go through it together.

Owns the meeting of callers; the product is the layer's own. A head reads all its weights for one row as for many, and
in a small model that is a quarter of a token's work.

Legend: M rows of all who wait, K hidden size, N vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarm.session.callers import SMOOTHING, Callers


@dataclass(slots=True, eq=False)
class _Ticket:
    rows_MK: Tensor
    result: Tensor | None = None


class Meeting:
    """Runs `product` for one caller after another, or for all that came meanwhile at once. For any threads."""

    def __init__(self, product: Callable[[Tensor], Tensor], callers: Callers | None = None) -> None:
        """`callers`: who is waited for."""
        self._product = product
        self._callers = Callers() if callers is None else callers
        self._waiting: list[_Ticket] = []
        self._busy = threading.Lock()
        self._came = threading.Event()
        self._product_s = 0.0
        """What a product takes."""

    def __call__(self, input_xK: Tensor) -> Tensor:
        """[..., N] for [..., K]. Raises what the product raises, to everybody in it who then tries again alone."""
        ticket = _Ticket(input_xK.reshape(-1, input_xK.shape[-1]))
        self._waiting.append(ticket)
        if len(self._callers) > 1:
            self._callers.came_to_head(threading.get_ident())
            self._came.set()
        with self._busy:
            if ticket.result is None:
                if len(self._callers) > 1:
                    self._gather()
                began_s = time.perf_counter()
                together = self._take(ticket)
                with torch.inference_mode(False), torch.no_grad():  # others may not be in the leader's mode
                    product_MN = self._product(torch.cat([other.rows_MK for other in together]))
                parts = torch.split(product_MN, [len(other.rows_MK) for other in together])
                for other, part_MN in zip(together, parts, strict=True):
                    # a part of its own: who keeps it must not keep everybody's
                    other.result = part_MN if len(together) == 1 else part_MN.clone()
                took_s = time.perf_counter() - began_s
                self._product_s += (SMOOTHING if self._product_s else 1.0) * (took_s - self._product_s)
        assert ticket.result is not None
        return ticket.result.view(*input_xK.shape[:-1], -1)

    def _gather(self) -> None:
        """Wait for those who are on their way, as long as that pays."""
        now_s = time.perf_counter()
        until_s = now_s + self._product_s
        while True:
            self._came.clear()
            patience_s = self._callers.patience_s(len(self._waiting), self._product_s, now_s, to_head=True)
            wait_s = min(patience_s, until_s - now_s)
            if wait_s <= 0 or not self._came.wait(wait_s):
                return
            now_s = time.perf_counter()

    def _take(self, own: _Ticket) -> list[_Ticket]:
        """Everybody who can share a product with `own`; those of a leader that failed come back for themselves."""
        count = len(self._waiting)
        waiting, self._waiting[:count] = self._waiting[:count], []
        like = own.rows_MK
        together = [other for other in waiting if other is own or _alike(other.rows_MK, like)]
        return together if own in together else [own, *together]


def _alike(rows_MK: Tensor, like_MK: Tensor) -> bool:
    return rows_MK.dtype is like_MK.dtype and rows_MK.device == like_MK.device


def share_head(model: Any, callers: Callers | None = None) -> None:
    """Let all threads that run `model` meet at its head, where that is a plain layer without gradients."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        own, meeting = head.forward, Meeting(head.forward, callers)

        def forward(input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
            grads = torch.is_grad_enabled() and (input.requires_grad or head.weight.requires_grad)
            return own(input) if grads else meeting(input)

        head.forward = forward  # type: ignore[method-assign]
