"""Strangers ask a peer for gradients: what is taken in, what is kept, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peers.model.adapters import WIDTH, Adapter, as_rows, of_rows
from peers.runtime.gradients import Graph, Outcome, Passage
from peers.serving import training
from peers.serving.adapters import AdapterLimits
from peers.serving.admission import AdmissionLimits
from peers.serving.metrics import training_metrics
from peers.serving.shelves import Shelf, TrainingLimits
from peers.serving.training import Training
from peers.transport.links import Link
from peers.wire import parts, tensors
from peers.wire.messages import PREFIX, AdapterGradient, AdapterTarget, Code, Forget, Train, Trained, Untrained
from peers.wire.messages import Adapter as AdapterMessage
from routing.ids import BlockSpan, PeerId
from tests.peers.serving.hops import HIDDEN, MODEL, Client, Hop, Route, rows

GRAPH_BYTES = 1000


class ToyModel:
    max_positions = 100
    device = "cpu"

    @staticmethod
    def prefix_shape(block: int) -> tuple[int, int]:
        return (2, 2)


class ToyParts:
    """What training asks of an engine: every block adds 1 to a value, and doubles a gradient."""

    def __init__(self, hop: Hop) -> None:
        self.model = ToyModel()
        self.packs_sessions = True
        self.compute_s = 0.005
        self.linear_shape = hop.engine.linear_shape
        self.graphs: list[bool] = []
        """For each backward, whether a graph was given."""

    def parts(self, span: BlockSpan) -> list[tuple[Any, BlockSpan]]:
        return [(self, span)]

    async def run_between(self, owner: PeerId, job: Any) -> tuple[Outcome, float]:
        await asyncio.sleep(self.compute_s)
        return job(64), self.compute_s


def toy_forward(engine: ToyParts, passage: Passage, keep: bool, _: int) -> Outcome:
    graph = Graph(num_bytes=GRAPH_BYTES) if keep else None
    added = 0.0 if passage.adapter is None else float(passage.adapter.values.sum())
    return Outcome(passage.input_TH + len(passage.span) + added, graph, GRAPH_BYTES / passage.tokens if keep else 0.0)


def toy_backward(engine: ToyParts, passage: Passage, gradient: Tensor, graph: Graph | None, _: int) -> Outcome:
    engine.graphs.append(graph is not None)
    added = None if passage.adapter is None else passage.adapter.values + 1
    return Outcome(gradient * 2, None, 0.0, added)


class Lesson(Route):
    """One peer that trains, and a client by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        super().__init__(1)
        (self.hop,) = self.hops
        monkeypatch.setattr(training, "_forward_job", toy_forward)
        monkeypatch.setattr(training, "_backward_job", toy_backward)
        self.engine = ToyParts(self.hop)
        for name in ("parts", "run_between", "model"):
            setattr(self.hop.engine, name, getattr(self.engine, name))
        self.training = Training(
            links=self.hop.links,
            handler=self.hop.handler,
            limits=TrainingLimits(**limits),
            clock=lambda: asyncio.get_running_loop().time(),
        )

    def another_client(self) -> Client:
        return listening(super().another_client())

    async def __aenter__(self) -> Lesson:
        listening(self.client)
        await super().__aenter__()
        self._running = asyncio.create_task(self.training.run())
        return self

    async def __aexit__(self, kind: object, *others: object) -> None:
        await super().__aexit__(kind, *others)
        assert not self._running.done(), "a stranger brought training down"
        self._running.cancel()
        await asyncio.wait([self._running])
        if kind is None:
            left = self.training
            assert (left._tokens, len(left._tokens_of), len(left._arriving), len(left.shelf)) == (0, 0, 0, 0)
            assert (left.shelf.num_bytes, len(left._busy)) == (0, 0)


def listening(client: Client) -> Client:
    for kind in (Trained, Untrained, AdapterGradient):
        client.links.handle(kind, client._receive)
    return client


def work_of(work: int = 1, **changes: Any) -> Train:
    fields: dict[str, Any] = {
        "work": bytes([work]) * 16,
        "model": MODEL.digest,
        "start": 0,
        "end": 4,
        "lengths": (3, 2),
        "keep": True,
        "first": 0,
        "count": 5,
        "dtype": "float32",
        "hidden": HIDDEN,
    }
    return Train(**fields | changes)


async def asks(
    lesson: Lesson, work: int = 1, hidden: Tensor | None = None, client: Client | None = None, **changes: Any
) -> None:
    hidden = rows(0, 5) if hidden is None else hidden
    await (client or lesson.client).send(lesson.hop, work_of(work, **changes), tensors.pack(hidden, "float32"))


async def answer(client: Client) -> Tensor:
    message, payload = await client.next(Trained)
    return tensors.unpack(payload, dtype=message.dtype, count=message.count, hidden=message.hidden)


async def refusal(client: Client) -> str:
    message, _ = await client.next(Untrained)
    return message.code


@pytest.mark.looptime
async def test_a_forward_and_its_backward_use_what_is_kept_and_the_client_may_forget_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Lesson(monkeypatch) as lesson:
        await asks(lesson)
        assert torch.equal(await answer(lesson.client), rows(0, 5) + 4)
        assert lesson.training.shelf.num_bytes == GRAPH_BYTES + rows(0, 5).nbytes
        for _ in range(2):  # a repeated backward finds the input, and no graph
            await asks(lesson, backward=True, hidden=rows(1, 5))
            assert torch.equal(await answer(lesson.client), rows(1, 5) * 2)
        assert lesson.engine.graphs == [True, False]
        await lesson.client.send(lesson.hop, Forget(works=(work_of().work,)))
        await asks(lesson, backward=True, hidden=rows(1, 5))
        assert await refusal(lesson.client) == Code.FORGOTTEN
        both = torch.cat((rows(0, 5), rows(1, 5)))
        await asks(lesson, backward=True, again=True, hidden=both, count=10)
        assert torch.equal(await answer(lesson.client), rows(1, 5) * 2)
        account = lesson.hop.admission.account(lesson.client.transport.peer_id)
        assert (account.steps, account.positions) == (4, 20)


@pytest.mark.looptime
async def test_rows_come_in_parts_and_leave_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2 * HIDDEN * 4)
    async with Lesson(monkeypatch) as lesson:
        for first, count in ((0, 2), (2, 2), (4, 1)):
            await asks(lesson, first=first, count=count, keep=False, hidden=rows(first, count))
        received = [await answer(lesson.client) for _ in range(3)]
        assert torch.equal(torch.cat(received), rows(0, 5) + 4)


@pytest.mark.looptime
async def test_a_work_that_will_never_fit_is_refused_and_not_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch) as lesson:
        lesson.hop.admission.limits = AdmissionLimits(max_bytes_in_flight_per_peer=rows(0, 5).nbytes)
        await asks(lesson)
        await answer(lesson.client)
        await asks(lesson, backward=True, again=True, hidden=rows(0, 10), count=10)
        assert await refusal(lesson.client) == Code.TOO_LONG


NAN = rows(0, 5).clone()
NAN[3, 1] = float("nan")


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"hidden_": 8}, Code.MALFORMED),
        ({"hidden": NAN}, Code.MALFORMED),
        ({"dtype": "int8"}, Code.MALFORMED),
        ({"count": 4}, Code.MALFORMED),
        ({"lengths": (3, 3), "count": 7}, Code.MALFORMED),
        ({"lengths": (101,)}, Code.TOO_LONG),
        ({"lengths": (90,) * 3}, Code.TOO_LONG),
        ({"jumps": ((3, 99),)}, Code.TOO_LONG),
        ({"jumps": ((5, 1),)}, Code.MALFORMED),
        ({"jumps": ((1, 1), (1, 1))}, Code.MALFORMED),
        ({"lengths": (1 << 24,) * 1024, "jumps": ((0, 1),)}, Code.TOO_LONG),
        ({"end": 5}, Code.WRONG_MODEL),
        ({"start": 4, "end": 4}, Code.WRONG_MODEL),
        ({"model": bytes(32)}, Code.WRONG_MODEL),
        ({"backward": True}, Code.FORGOTTEN),
    ],
    ids=str,
)
async def test_what_makes_no_sense_is_refused_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str
) -> None:
    async with Lesson(monkeypatch, max_tokens_per_peer=256) as lesson:
        hidden = changes.pop("hidden", None)
        wrong = {"hidden": changes.pop("hidden_")} if "hidden_" in changes else {}
        message = work_of(1, **changes, **wrong)
        await lesson.client.send(lesson.hop, message, tensors.pack(rows(0, 5) if hidden is None else hidden, "float32"))
        assert await refusal(lesson.client) == code
        await asks(lesson, 2, keep=False)
        assert torch.equal(await answer(lesson.client), rows(0, 5) + 4)


@pytest.mark.looptime
async def test_parts_that_leave_a_gap_or_change_their_mind_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch) as lesson:
        for second in ({"first": 3, "count": 2}, {"first": 2, "count": 3, "end": 3}, {"first": 2, "count": 4}):
            await asks(lesson, first=0, count=2, hidden=rows(0, 2))
            await asks(lesson, hidden=rows(0, second["count"]), **second)
            assert await refusal(lesson.client) == Code.MALFORMED
            await asks(lesson, first=4, count=1, hidden=rows(4, 1))  # the rest of it is passed by
        await asks(lesson, keep=False)
        assert torch.equal(await answer(lesson.client), rows(0, 5) + 4)


@pytest.mark.looptime
async def test_nobody_takes_everybodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch, max_tokens_per_peer=10, max_tokens=15) as lesson:
        other, lesson.engine.compute_s = lesson.another_client(), 1.0
        for work in (1, 2, 3):
            await asks(lesson, work, keep=False)
        message, _ = await lesson.client.next(Untrained)
        assert (message.code, message.work) == (Code.BUSY, work_of(3).work)
        assert message.retry_after_s > 0
        await asks(lesson, 4, client=other, keep=False)
        await asks(lesson, 5, client=other, keep=False)
        assert await refusal(other) == Code.BUSY
        await answer(other)
        for _ in (1, 2):
            await answer(lesson.client)


@pytest.mark.looptime
async def test_what_nobody_comes_back_for_ends_with_its_lease_or_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch, lease_s=30.0) as lesson:
        await asks(lesson, 1)
        await answer(lesson.client)
        await asks(lesson, 2, first=0, count=2, hidden=rows(0, 2))  # and never the rest
        await asyncio.sleep(31.0 + training.SWEEP_S)
        assert len(lesson.training.shelf) == 0
        assert not lesson.training._arriving
        await asks(lesson, 1, backward=True)
        assert await refusal(lesson.client) == Code.FORGOTTEN
        other = lesson.another_client()
        await asks(lesson, 3, client=other)
        await answer(other)
        await asks(lesson, 4, client=other, first=0, count=2, hidden=rows(0, 2))
        lesson.engine.compute_s = 100.0
        await asks(lesson, 5, client=other)  # is being computed
        await other.close()
        await asyncio.sleep(1.0)
        assert len(lesson.training.shelf) == 0


@pytest.mark.looptime
async def test_a_peer_may_train_nobody_or_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch, max_bytes=0) as lesson:
        await asks(lesson)
        assert await refusal(lesson.client) == Code.NO_TRAINING
    async with Lesson(monkeypatch) as lesson:
        lesson.hop.handler.pause(True)
        await asks(lesson)
        assert await refusal(lesson.client) == Code.PAUSED


def adapter_of(seed: float = 0.5, block: int = 1, module: str = "proj", **changes: Any) -> Adapter:
    target = AdapterTarget(
        block, module, *{"rank": 2, "inputs": HIDDEN, "outputs": 2, "scaling": 1.0, **changes}.values()
    )
    return Adapter((target,), torch.full((target.rank * (target.inputs + target.outputs),), seed))


async def uploads(lesson: Lesson, adapter: Adapter, client: Client | None = None, name: bytes = b"") -> bytes:
    rows_of = as_rows(adapter.values)
    message = AdapterMessage(
        adapter=name or adapter.name,
        model=MODEL.digest,
        start=0,
        end=4,
        targets=adapter.targets,
        first=0,
        count=len(rows_of),
    )
    await (client or lesson.client).send(lesson.hop, message, tensors.pack(rows_of, "float32"))
    return message.adapter


@pytest.mark.looptime
async def test_an_adapter_serves_its_owner_alone_and_its_gradient_comes_behind_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Lesson(monkeypatch) as lesson:
        other, adapter = lesson.another_client(), adapter_of()
        name = await uploads(lesson, adapter)
        await asks(lesson, adapter=name)
        assert torch.equal(await answer(lesson.client), rows(0, 5) + 4 + 6.0)
        await asks(lesson, adapter=name, backward=True, hidden=rows(1, 5))
        assert torch.equal(await answer(lesson.client), rows(1, 5) * 2)
        works, gradient = await summed(lesson.client, adapter)
        assert works == (work_of().work,)
        assert torch.equal(gradient, adapter.values + 1)
        await asks(lesson, adapter=name, client=other)
        assert await refusal(other) == Code.UNKNOWN_ADAPTER
        await asks(lesson, 2, keep=False)
        assert torch.equal(await answer(lesson.client), rows(0, 5) + 4), "works without it are without it"
        await lesson.client.send(lesson.hop, Forget(works=(work_of().work,)))
        await asyncio.sleep(200.0)
        assert len(lesson.hop.handler.adapters.wardrobe) == 0


async def summed(client: Client, adapter: Adapter) -> tuple[tuple[bytes, ...], Tensor]:
    message, payload = await client.next(AdapterGradient)
    gradient = tensors.unpack(payload, dtype="float32", count=message.count, hidden=WIDTH)
    return message.works, of_rows(adapter.targets, gradient)


@pytest.mark.looptime
async def test_gradients_of_an_adapter_are_added_up_once_each_and_sent_behind_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Lesson(monkeypatch, max_bytes=1140) as lesson:
        adapter, total = adapter_of(), bytes([9]) * 16
        name = await uploads(lesson, adapter)
        backward = {"adapter": name, "backward": True, "again": True, "count": 10, "sum": total}
        both, others = torch.cat((rows(0, 5), rows(1, 5))), {"sum": bytes([8]) * 16}
        for work in (1, 2, 1):  # what was answered once may be asked again
            await asks(lesson, work, hidden=both, **backward)
            assert torch.equal(await answer(lesson.client), rows(1, 5) * 2)
        assert lesson.training.shelf.num_bytes == adapter.values.nbytes
        await asks(lesson, 4, hidden=both, **backward | others)
        await asks(lesson, 3, hidden=both, collect=True, **backward)
        await answer(lesson.client)
        await answer(lesson.client)
        works, gradient = await summed(lesson.client, adapter)
        assert works == tuple(work_of(work).work for work in (1, 2, 3))
        assert torch.equal(gradient, 3 * (adapter.values + 1))
        await asks(lesson, 5, keep=True)  # which leaves no room for a sum
        await answer(lesson.client)
        await asks(lesson, 6, hidden=both, **backward)
        await answer(lesson.client)
        works, gradient = await summed(lesson.client, adapter)
        assert (works, gradient[0]) == ((work_of(6).work,), adapter.values[0] + 1)
        await lesson.client.send(lesson.hop, Forget(works=(work_of(5).work,)))
        await asyncio.sleep(1.0)
        assert len(lesson.training.shelf) == 1, "a sum that nobody collects"
        await asyncio.sleep(lesson.training.shelf.limits.lease_s + training.SWEEP_S)
        lesson.hop.handler.adapters.clear()


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("adapter", "name", "code"),
    [
        (adapter_of(float("nan")), b"", Code.MALFORMED),
        (adapter_of(), bytes(32), Code.MALFORMED),
        (adapter_of(module="experts"), b"", Code.MALFORMED),
        (adapter_of(inputs=HIDDEN + 1), b"", Code.MALFORMED),
        (adapter_of(module=PREFIX), b"", Code.MALFORMED),
        (adapter_of(block=4), b"", Code.MALFORMED),
        (adapter_of(scaling=float("inf")), b"", Code.MALFORMED),
        (adapter_of(rank=256, inputs=1 << 16), b"", Code.MALFORMED),
    ],
    ids=["nan", "another name", "no linear layer", "shape", "prefix", "block", "scaling", "large"],
)
async def test_an_adapter_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, adapter: Adapter, name: bytes, code: str
) -> None:
    async with Lesson(monkeypatch) as lesson:
        small = Adapter(adapter.targets, adapter.values[:1000])  # the name of the large one is not what is tested
        await asks(lesson, adapter=await uploads(lesson, small, name=name or small.name))
        assert await refusal(lesson.client) == code
        assert len(lesson.hop.handler.adapters.wardrobe) == 0


@pytest.mark.looptime
async def test_adapters_of_one_client_take_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch) as lesson:
        lesson.hop.handler.adapters.wardrobe.limits = AdapterLimits(max_bytes_per_peer=3000)
        names = [await uploads(lesson, adapter_of(float(seed))) for seed in range(4)]
        await asks(lesson, adapter=names[3], keep=False)
        await answer(lesson.client)
        assert lesson.hop.handler.adapters.wardrobe.num_bytes() <= 3000
        await asks(lesson, adapter=names[0])
        assert await refusal(lesson.client) == Code.UNKNOWN_ADAPTER
        lesson.hop.handler.adapters.wardrobe.drop_where(lambda _: True)


@pytest.mark.looptime
async def test_what_was_done_is_counted_and_accounted_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Lesson(monkeypatch) as lesson:
        await asks(lesson)
        await answer(lesson.client)
        for _ in range(2):  # with the graph, and without
            await asks(lesson, backward=True, hidden=rows(1, 5))
            await answer(lesson.client)
        await asks(lesson, 2, lengths=(101,))
        await refusal(lesson.client)
        told = {
            (sample.name.removeprefix("hiveswarm_peer_training_"), *sample.labels.values()): sample.value
            for family in training_metrics(lesson.training)
            for sample in family.samples
        }
        assert told == {
            ("works_total", "forward"): 1,
            ("works_total", "backward"): 2,
            ("tokens_total",): 15,
            ("graphs_total",): 1,
            ("recomputes_total",): 1,
            ("refusals_total", Code.TOO_LONG): 1,
            ("bytes",): rows(0, 5).nbytes,
            ("queued_tokens",): 0,
        }
        account = lesson.hop.admission.account(lesson.client.transport.peer_id)
        assert (account.trained, account.positions) == (15, 15)
        await lesson.client.send(lesson.hop, Forget(works=(work_of().work,)))
        await asyncio.sleep(1.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "take", "drop", "expire", "lost", "add", "collect"]),
            st.integers(0, 2),
            st.integers(0, 3),
            st.integers(0, 40),
        ),
        max_size=60,
    )
)
def test_a_shelf_never_holds_more_than_it_may_and_knows_how_much(moves: list[tuple[str, int, int, int]]) -> None:
    shelf = Shelf(TrainingLimits(max_bytes=600, max_bytes_per_peer=400, lease_s=5.0))
    links = [cast(Link, SimpleNamespace(number=number)) for number in range(3)]
    sums: dict[tuple[PeerId, bytes], list[bytes]] = {}
    for now_s, (move, owner, work, size) in enumerate(moves):
        key = (PeerId(str(owner)), bytes([work]), 0)
        if move == "put":
            passage = Passage(span=BlockSpan(0, 1), lengths=(1,), regime_length=0, input_TH=torch.zeros(1, size))
            graph = Graph(num_bytes=10 * size) if size % 2 else None
            shelf.put(key, links[owner], passage, graph, float(now_s))
        elif move == "take":
            taken = shelf.take(key)
            assert taken is None or shelf.take(key) == (taken[0], None), "a graph serves once"
        elif move == "drop":
            shelf.drop_works(key[0], {key[1]})
            assert shelf.take(key) is None
            assert shelf.collect(key[:2]) is None
        elif move == "add":
            work = bytes([size % 5])
            if shelf.add(key[:2], links[owner], work, torch.ones(20), float(now_s)) and work not in sums.setdefault(
                key[:2], []
            ):
                sums[key[:2]].append(work)
        elif move == "collect":
            collected = shelf.collect(key[:2])
            if collected is not None:
                assert list(collected[0]) == sums.pop(key[:2])
                assert torch.equal(collected[1], torch.full((20,), len(collected[0])))
        elif move == "expire":
            shelf.expire(float(now_s))
        else:
            shelf.drop_link(links[owner])
        sums = {key: works for key, works in sums.items() if key in shelf._sums}
        sizes = [(key[0], one.num_bytes) for key, one in shelf._kept.items()]
        sizes += [(key[0], one.total.nbytes) for key, one in shelf._sums.items()]
        for owner_, mine in shelf._of.items():
            assert list(mine.inputs) == [key for key in shelf._kept if key[0] == owner_] != []
            assert mine.graphs.keys() == {key for key in mine.inputs if shelf._kept[key].graph is not None}
        assert shelf._of.keys() == {key[0] for key in shelf._kept}
        assert shelf.num_bytes == sum(num_bytes for _, num_bytes in sizes) <= 600
        for number in range(3):
            held = sum(num_bytes for owner_, num_bytes in sizes if owner_ == PeerId(str(number)))
            assert held == shelf._bytes_of[PeerId(str(number))] <= 400
    shelf.clear()
    assert shelf.num_bytes == 0


def test_one_client_may_use_a_whole_shelf_and_of_several_who_holds_more_than_its_part_gives_way() -> None:
    shelf = Shelf(TrainingLimits(max_bytes=1200, max_bytes_per_peer=1200))
    link = cast(Link, object())

    def put(owner: str, work: int) -> bool:
        """100 bytes, nine tenths of them a graph."""
        passage = Passage(span=BlockSpan(0, 1), lengths=(1,), regime_length=0, input_TH=torch.zeros(1, 5).half())
        return shelf.put((PeerId(owner), bytes([work]), 0), link, passage, Graph(num_bytes=90), 0.0)

    def kept(owner: str) -> tuple[int, int]:
        """Works, and graphs."""
        mine = [one for key, one in shelf._kept.items() if key[0] == PeerId(owner)]
        return len(mine), sum(one.graph is not None for one in mine)

    assert [put("first", work) for work in range(13)] == [True] * 12 + [False]
    assert [put("second", work) for work in range(6)] == [True] * 6
    assert kept("first") == (12, 5), "graphs go first: seven of 90 make room for six of 100"
    assert not put("second", 6), "that would be more than its half"
    assert put("third", 0)
    assert shelf._kept[PeerId("first"), bytes([0]), 0].graph is not None, "what came last goes"


def test_limits_out_of_range_are_refused() -> None:
    for wrong in ({"max_bytes": -1}, {"max_tokens": 0}, {"lease_s": 0.0}):
        with pytest.raises(ValueError, match="negative"):
            TrainingLimits(**cast(Any, wrong))


def gathered(parts_: Iterator[tuple[int, int, memoryview]], count: int, dtype: str) -> Tensor:
    gathering = parts.Gathering(count, HIDDEN, dtype)
    *before, last = [gathering.add(first, size, dtype, payload) for first, size, payload in parts_]
    assert last
    assert not any(before)
    return gathering.rows


@given(st.integers(1, 40), st.sampled_from(sorted(tensors.DTYPES)), st.integers(1, 9))
def test_rows_that_are_cut_come_together_again(count: int, dtype: str, rows_per_part: int) -> None:
    whole = rows(0, count).to(tensors.DTYPES[dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", rows_per_part * HIDDEN * whole.itemsize)
        assert torch.equal(gathered(parts.cut(whole, dtype), count, dtype), whole)
