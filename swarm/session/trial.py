"""Peers that were slow when this client used them last: now and then one of them runs a few positions of no session.

So that they are used again soon after they have recovered, and nobody's tokens wait to find that out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

import torch

from peers.errors import ProtocolError, Refused
from peers.transport.links import Link
from peers.wire import tensors
from peers.wire.messages import Close, Failed, Open, Opened, Result, Step, Urgency
from routing.errors import PeerError, Unavailable
from routing.ids import SessionId
from routing.records import Announcement
from swarm.session.live import Sessions

logger = logging.getLogger(__name__)

TRIAL_EVERY_S = 10.0
TRIAL_STEPS = 4
"""Of one position each; the fastest counts, as whatever else a machine does only adds."""
TRIAL_TIMEOUT_S = 10.0


class Trials:
    """Those of one model at one client; `run` runs until cancelled."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def run(self) -> None:
        client, model = self._sessions.client, self._sessions.model.model
        while True:
            await asyncio.sleep(TRIAL_EVERY_S)
            for announcement in client.router.doubted(model, client.discovery.now_s())[:1]:
                await self.one(announcement)

    async def one(self, announcement: Announcement) -> None:
        """Have a peer run a few positions, and tell the router how long they took; nothing where it does not."""
        client, peer, span = self._sessions.client, announcement.peer_id, announcement.spans.parts[0]
        session = SessionId(secrets.token_bytes(16))
        answers: asyncio.Queue[Opened | Result | Failed] = asyncio.Queue(2)
        self._sessions.trials[session] = (peer, answers)
        link: Link | None = None
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT_S):
                link = await client.links.to(peer, announcement.addresses)
                opening = Open(
                    session=session.raw,
                    epoch=1,
                    model=self._sessions.model.model.digest,
                    start=span.start,
                    end=span.end,
                    previous=None,
                    next=None,
                    expects=TRIAL_STEPS,
                )
                await link.send(opening)
                await _answer(answers)
                times_s = [
                    await self._step(link, session, span.start, number, answers) for number in range(TRIAL_STEPS)
                ]
        except (PeerError, Unavailable, TimeoutError) as error:
            logger.info("peer %s was not tried: %s", peer, error or "no answer in time")
        else:
            client.router.on_trial(peer, len(span), min(times_s), client.discovery.now_s())
            logger.info("peer %s was tried: %.4f s through %s blocks", peer, min(times_s), len(span))
        finally:
            del self._sessions.trials[session]
            if link is not None and not link.closed:
                self._sessions.client.tasks.spawn(_close(link, session), name=f"close {session}")

    async def _step(
        self, link: Link, session: SessionId, block: int, number: int, answers: asyncio.Queue[Opened | Result | Failed]
    ) -> float:
        hidden = self._sessions.model.hidden_size
        step = Step(
            session=session.raw,
            block=block,
            epoch=1,
            step=number + 1,
            first=number,
            count=1,
            want_from=1,
            dtype="float32",
            hidden=hidden,
            urgency=Urgency.BACKGROUND,
        )
        await link.send(step, tensors.pack(torch.zeros(1, hidden), "float32"))
        answer = await _answer(answers)
        if not isinstance(answer, Result) or len(answer.hops) != 1:
            raise ProtocolError(f"{link.remote} answered a step of one hop with {type(answer).__name__}")
        return answer.hops[0][1]


async def _answer(answers: asyncio.Queue[Opened | Result | Failed]) -> Opened | Result:
    """The next one. Raises Refused."""
    answer = await answers.get()
    if isinstance(answer, Failed):
        raise Refused(f"{answer.peer}: {answer.message}", code=answer.code)
    return answer


async def _close(link: Link, session: SessionId) -> None:
    try:
        await link.send(Close(sessions=(session.raw,)))
    except PeerError as error:
        logger.debug("trial %s: %s", session, error)  # the peer frees it with the link
