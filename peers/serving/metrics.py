"""What a peer counts, for Prometheus: gathered when somebody asks, in the node's event loop, between two messages.

Owns the names of the metrics. Labels are phases, codes and states: nothing that identifies a client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from peers.exposition import by_label, counter, gauge, histogram, step_seconds
from peers.serving.handler import Handler
from peers.serving.training import Training
from peers.transport.links import Links
from routing.records import Announcement, PeerState

logger = logging.getLogger(__name__)

GATHER_TIMEOUT_S = 5.0


class PeerMetrics(Collector):
    """Gathers from a peer's parts. Made in their event loop, read from other threads."""

    def __init__(self, handler: Handler, training: Training, links: Links, record: Callable[[], Announcement]) -> None:
        """`record`: what the peer would announce now."""
        self._handler, self._training, self._links, self._record = handler, training, links, record
        self._loop = asyncio.get_running_loop()

    def describe(self) -> list[Metric]:
        return []  # nothing is gathered when this is registered

    def collect(self) -> Iterator[Metric]:
        try:
            gathered = asyncio.run_coroutine_threadsafe(self._gather(), self._loop)
        except RuntimeError:  # the loop is closed: the node has ended
            return
        try:
            yield from gathered.result(GATHER_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            gathered.cancel()
            logger.warning("metrics: the event loop did not answer within %.0f s", GATHER_TIMEOUT_S)

    async def _gather(self) -> list[Metric]:
        record, handler, volume = self._record(), self._handler, self._links.volume
        counts, pushes, journal = handler.counts, handler.pusher.counts, handler.journal
        labels = {
            "model": record.model_name,
            "blocks": str(record.spans),
            "dtype": record.dtype,
            "quantization": record.quantization,
            "version": record.version,
        }
        metrics: list[Metric] = [
            gauge("hiveswarm_peer_info", "What this peer serves.", {tuple(labels.values()): 1}, *labels),
            gauge(
                "hiveswarm_peer_state",
                "1 for the state that this peer announces.",
                {(state.value,): float(state is record.state) for state in PeerState},
                "state",
            ),
            gauge("hiveswarm_peer_sessions", "Sessions of clients held here.", {(): len(handler.ledger)}),
            step_seconds(
                "hiveswarm_peer_step_seconds", "Where the time of a step went at this peer.", {(): counts.steps}
            ),
            counter("hiveswarm_peer_tokens", "Positions computed.", by_label(counts.tokens), "kind"),
            counter("hiveswarm_peer_opened_sessions", "Sessions that began here.", {(): counts.opened}),
            counter(
                "hiveswarm_peer_failovers",
                "Sessions that went on here over another route, as a peer before or behind was lost.",
                {(): counts.resumed},
            ),
            counter(
                "hiveswarm_peer_replays",
                "Steps sent again from the journal to rebuild a successor.",
                {(): counts.replays},
            ),
            counter("hiveswarm_peer_replayed_tokens", "Positions of those.", {(): counts.replayed_positions}),
            counter(
                "hiveswarm_peer_rpc_errors",
                "What this peer declined or gave up, by code.",
                by_label(counts.failures),
                "code",
            ),
            counter(
                "hiveswarm_peer_outputs",
                "Outputs that left: pushed to the next peer, relayed through the client instead, returned to it.",
                {("pushed",): pushes.pushed, ("relayed",): pushes.relayed, ("returned",): pushes.returned},
                "way",
            ),
            gauge(
                "hiveswarm_peer_journal_bytes",
                "Of memory, for what was sent on.",
                {(): sum(journal.memory_bytes.values())},
            ),
            counter(
                "hiveswarm_peer_journal_evictions",
                "Sessions and prefixes that it had no room for.",
                {(): journal.evictions},
            ),
            counter(
                "hiveswarm_peer_sent_bytes", "Of frames to others; the directory comes on top.", {(): volume.sent_bytes}
            ),
            counter("hiveswarm_peer_received_bytes", "Of frames from others.", {(): volume.received_bytes}),
            gauge(
                "hiveswarm_peer_adapter_bytes",
                "Of memory, for clients' adapters.",
                {(): handler.adapters.wardrobe.num_bytes()},
            ),
            *training_metrics(self._training),
        ]
        if (engine := handler.engine) is None:
            return metrics
        stats, done = engine.stats(), engine.counts()
        pages = {
            "used": stats.pages - stats.free_pages,
            "kept": stats.kept_pages,
            "free": stats.free_pages - stats.kept_pages,
        }
        return [
            *metrics,
            gauge("hiveswarm_peer_queued_tokens", "Positions that wait for the engine.", {(): stats.queued_tokens}),
            gauge("hiveswarm_peer_works", "Steps in the engine, waiting or running.", {(): done.works}),
            gauge(
                "hiveswarm_peer_cache_pages",
                "Of the KV cache; kept ones hold prefixes until room is needed.",
                by_label(pages),
                "state",
            ),
            gauge(
                "hiveswarm_peer_room_tokens",
                "Positions that one session more may be promised, as this peer announces it.",
                {(): handler.room_tokens},
            ),
            counter(
                "hiveswarm_peer_preemptions", "Sessions whose pages were given to another.", {(): done.preemptions}
            ),
            counter("hiveswarm_peer_prefix_hits", "Sessions that began with a kept prefix.", {(): stats.prefix_hits}),
            counter(
                "hiveswarm_peer_prefix_tokens", "Positions of those, which nobody computed.", {(): stats.prefix_tokens}
            ),
            histogram("hiveswarm_peer_batch_steps", "Steps in each forward.", {(): done.batch_works}),
            histogram("hiveswarm_peer_batch_tokens", "Positions in each forward.", {(): done.batch_tokens}),
        ]


def training_metrics(training: Training) -> Iterator[Metric]:
    counts = training.counts
    yield counter(
        "hiveswarm_peer_training_works",
        "Works of training that were computed.",
        {("forward",): counts.forwards, ("backward",): counts.backwards},
        "direction",
    )
    yield counter("hiveswarm_peer_training_tokens", "Positions of those.", {(): counts.tokens})
    yield counter("hiveswarm_peer_training_graphs", "Forwards whose graph was kept for a backward.", {(): counts.kept})
    yield counter(
        "hiveswarm_peer_training_recomputes", "Backwards that ran their forward again.", {(): counts.recomputed}
    )
    yield counter(
        "hiveswarm_peer_training_refusals", "Works that were declined, by code.", by_label(counts.failures), "code"
    )
    yield gauge(
        "hiveswarm_peer_training_bytes",
        "Of memory, for what waits for backwards.",
        {(): training.shelf.num_bytes},
    )
    yield gauge(
        "hiveswarm_peer_training_queued_tokens", "Positions that wait or are computed.", {(): training.waiting_tokens}
    )
