"""Decoding steps on a CUDA device in one call each: CUDA graphs over buckets of sessions and of positions.

A short forward keeps the GPU busy for less time than the CPU takes to launch its few hundred kernels. A graph is all
the launches of one forward, recorded once and repeated with whatever its tensors hold by then. So what differs from
step to step lies in tensors of fixed shapes here: the hidden states, the positions, where new keys and values go, and
where old ones are. Sessions are filled up to the next bucket with rows that attend to a slot of their own.

Owns the buckets, the fixed tensors and the choice between graph and program. A bucket is recorded between forwards;
until then the program runs. Recording is a function that is handed in; a test on a CPU hands in one that records
nothing and runs again.

Names as in `attention`; R runs of slots in which a session's positions may lie.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peers.model.support import MaskFunction, one_line
from peers.runtime.attention import LayerPool, Pattern, Segment, last_slots, look, skip
from peers.runtime.program import Programs

logger = logging.getLogger(__name__)

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Sessions per graph."""
NOBODYS = COUNTS[-1] + 1
"""Slots that a pool must have behind its pages', all zero: one for each row of nobody, and one that stays so."""
REACHES = (256, 1024, 4096, 16384, 65536)
"""Positions that the longest session of a graph can see; every row costs the attention to so many."""
FILLED = 1 / 8
"""Of what a graph gathers, how much sessions must see for it to run. Beyond the smallest reach sessions of one length
always do, in half of the rows and a quarter of the reach; a long one among short ones would have all gather as much."""
COPIES = 2
"""Of the keys and values that a layer gathers, while it attends: not every kernel takes them as they lie."""
RUNS = 32
"""A session whose pages lie in more runs goes by the program."""
GRAPH_BYTES = 1 << 30
"""Of the device's memory, unless a plan says how much graphs may take (`peers.capacity`)."""
TRIALS = 5
DIFFERENCE = 0.02
"""Between graph and program, of what the span adds to a row. On a GPU other shapes mean other kernels."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Record a forward; what is returned repeats it, and holds the output afterwards. Raises RuntimeError."""


class Rows:
    """The attention of T sessions, each with one new position and seeing at most L, from tensors of fixed shapes.

    Rows that are filled up attend to a slot of nobody's each. What a row does not see is read from the last of these:
    even under a mask, a NaN would be one.
    """

    def __init__(self, count: int, reach: int, pools: Sequence[LayerPool], like_H: Tensor) -> None:
        self.count, self.reach = count, reach
        self.hidden_1TH = like_H.new_zeros(1, count, len(like_H))
        self._pools = pools
        self._device = like_H.device
        self._unseen = pools[0].keys_1JSK.shape[2] - 1
        self._nobodys = list(range(self._unseen - count, self._unseen))
        self.positions_1T = torch.zeros(1, count, dtype=torch.long, device=self._device)
        tables = 1 + max(pool.table for pool in pools)
        nobodys_T = torch.tensor(self._nobodys, device=self._device)
        self._written = [nobodys_T.clone() for _ in range(tables)]
        self._read: dict[tuple[MaskFunction, int], Tensor] = {}
        """[T, R, 2]: the first slot and the length of each run that a row sees, for each mask over each table."""
        self._expanded: dict[tuple[MaskFunction, int], tuple[Tensor, Tensor]] = {}
        self._layer = 0

    def run(self, programs: Programs) -> Tensor:
        """One forward of what the tensors hold; [1, T, H]."""
        self._expanded.clear()
        self._layer = 0
        output_1TH = programs(self.hidden_1TH, self.positions_1T, self)
        self._expanded.clear()  # a graph's memory may be another one's, too, as soon as it has run
        return output_1TH

    def load(self, hidden_1TH: Tensor, tables: Sequence[Sequence[Segment]]) -> bool:
        """Set the tensors to these steps, at most as many as there are rows. False where a step does not fit them."""
        empty = self.count - len(tables[0])
        reads = {}
        for function, table in self._read:
            rows = []
            for segment in tables[table]:
                sight = look(segment, function, _HOST)
                runs = skip(segment.runs, sight.skipped)
                if sight.mask_nL is not None or len(runs) > RUNS or segment.end - segment.first > self.reach:
                    return False
                rows.append(_filled(runs))
            rows += [_filled([(slot, 1)]) for slot in self._nobodys[self.count - empty :]]
            reads[function, table] = rows
        for key, rows in reads.items():
            self._read[key].copy_(_on_host(rows), non_blocking=True)
        for written, segments in zip(self._written, tables, strict=True):
            slots = [slot for segment in segments for slot in last_slots(segment)]
            written.copy_(_on_host(slots + self._nobodys[self.count - empty :]), non_blocking=True)
        positions = [segment.start for segment in tables[0]]
        self.positions_1T.copy_(_on_host([positions + [0] * empty]), non_blocking=True)
        self.hidden_1TH[:, : self.count - empty].copy_(hidden_1TH, non_blocking=True)
        self.hidden_1TH[:, self.count - empty :].zero_()
        return True

    def attend(
        self,
        q_1HTK: Tensor,
        k_1JTK: Tensor,
        v_1JTV: Tensor,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        pool = self._pools[self._layer]
        self._layer += 1
        written_T = self._written[pool.table]
        pool.keys_1JSK.index_copy_(2, written_T, k_1JTK)
        pool.values_1JSV.index_copy_(2, written_T, v_1JTV)
        slots_n, seen_T11L = self._slots(pattern.function, pool.table)
        T, L, J = self.count, self.reach, k_1JTK.shape[1]
        k_TJLK = pool.keys_1JSK[0].index_select(1, slots_n).view(J, T, L, -1).transpose(0, 1)
        v_TJLV = pool.values_1JSV[0].index_select(1, slots_n).view(J, T, L, -1).transpose(0, 1)
        q_TJGK = q_1HTK[0].transpose(0, 1).reshape(T, J, -1, q_1HTK.shape[3])
        if softcap is None and sinks_H is None and k_TJLK.shape[3] == v_TJLV.shape[3]:
            out_TJGV = F.scaled_dot_product_attention(q_TJGK, k_TJLK, v_TJLV, attn_mask=seen_T11L, scale=scale)
        else:
            scores_TJGL = (q_TJGK @ k_TJLK.transpose(2, 3)).float() * scale
            if softcap is not None:
                scores_TJGL = torch.tanh(scores_TJGL / softcap) * softcap
            scores_TJGL = scores_TJGL.masked_fill(~seen_T11L, float("-inf"))
            if sinks_H is not None:
                sinks_TJG1 = sinks_H.float().view(1, J, -1, 1).expand(T, -1, -1, -1)
                scores_TJGL = torch.cat([scores_TJGL, sinks_TJG1], 3)
            out_TJGV = torch.softmax(scores_TJGL, 3)[..., :L].to(v_TJLV.dtype) @ v_TJLV
        return out_TJGV.reshape(1, T, q_1HTK.shape[1], -1)

    def _slots(self, function: MaskFunction, table: int) -> tuple[Tensor, Tensor]:
        """The slots that the rows read, [T · L], and which of them they see, [T, 1, 1, L]: the others are nobody's."""
        key = (function, table)
        if key not in self._read:
            rows = [_filled([(slot, 1)]) for slot in self._nobodys]
            self._read[key] = torch.tensor(rows, device=self._device)
        if key not in self._expanded:
            first_TR, count_TR = self._read[key].unbind(2)
            end_TR = count_TR.cumsum(1)
            at_TL = torch.arange(self.reach, device=self._device).expand(self.count, -1)
            run_TL = torch.searchsorted(end_TR, at_TL.contiguous(), right=True).clamp_(max=RUNS - 1)
            slot_TL = at_TL + (first_TR - end_TR + count_TR).gather(1, run_TL)
            seen_TL = at_TL < end_TR[:, -1:]
            slots_n = torch.where(seen_TL, slot_TL, self._unseen).flatten()
            self._expanded[key] = slots_n, seen_TL[:, None, None]
        return self._expanded[key]


_Bucket = tuple[int, int]
"""Of sessions, and of positions that the longest of them sees."""


class Graphs:
    """One graph for each pair of buckets in which it is right and pays, of one span in one rotary regime."""

    def __init__(
        self, programs: Programs, pools: Sequence[LayerPool], like_H: Tensor, record: Record, max_bytes: int
    ) -> None:
        """`max_bytes`: of the device's memory, for what any of the graphs gathers; they share it."""
        self._programs, self._pools, self._like_H, self._record = programs, pools, like_H, record
        self._max_bytes = max_bytes
        self._graphs: dict[_Bucket, _Graph | None] = {}
        self._wanted = [(count, reach) for reach in REACHES[:2] for count in COUNTS][::-1]
        """To be recorded: what most steps need, the largest first, whose memory does for the others; and whatever else
        steps came for."""

    @property
    def complete(self) -> bool:
        """Whether `prepare` has nothing to do."""
        return not self._wanted

    def prepare(self) -> Iterator[None]:
        """Record what is wanted, in steps between which forwards may run."""
        while self._wanted:
            yield from self._prepared(*self._wanted[0])
            del self._wanted[0]
            yield

    def __call__(self, hidden_1TH: Tensor, tables: Sequence[Sequence[Segment]]) -> Tensor | None:
        """The span's output for one new position of each session, [1, T, H]; None where the program is to run.

        It lies in the graph's own memory: take it away before the next forward.
        """
        steps = tables[0]
        if any(segment.tokens > 1 for segment in steps) or len(steps) > COUNTS[-1]:
            return None
        longest = max(segment.end - segment.first for segments in tables for segment in segments)
        if longest > REACHES[-1]:
            return None
        count, reach = _bucket(COUNTS, len(steps)), _bucket(REACHES, longest)
        seen = max(sum(segment.end - segment.first for segment in segments) for segments in tables)
        if reach > REACHES[0] and seen < FILLED * count * reach:
            return None
        if (count, reach) not in self._graphs and (count, reach) not in self._wanted:
            self._wanted.append((count, reach))
        graph = self._graphs.get((count, reach))
        return None if graph is None else graph(hidden_1TH, tables)

    def _prepared(self, count: int, reach: int) -> Iterator[None]:
        """Record the graph of a bucket and use it, if it is right and pays; in steps."""
        self._graphs[count, reach] = None
        gathered_bytes = COPIES * count * reach * max(map(_slot_bytes, self._pools))
        if gathered_bytes > self._max_bytes:
            logger.info("%s sessions that see %s positions want too much memory for a graph", count, reach)
            return
        try:
            rows = Rows(count, reach, self._pools, self._like_H)
            generator = torch.Generator().manual_seed(count)
            rows.hidden_1TH.copy_(torch.randn(1, count, len(self._like_H), generator=generator))
            expected = rows.run(self._programs).clone()  # also makes the tensors that the masks need
            yield
            graph = _Graph(rows, *self._record(lambda: rows.run(self._programs)))
            yield
            wanted_s = fastest_s(lambda: rows.run(self._programs), rows.hidden_1TH.device)
            taken_s = fastest_s(graph.repeat, rows.hidden_1TH.device)
            added = (expected - rows.hidden_1TH).float().norm()
            right = bool((graph.output_1TH - expected).float().norm() <= DIFFERENCE * added)
        except RuntimeError as error:  # of the device: out of memory, or an operation that no graph can hold
            logger.info("steps of %s sessions run without a graph: %s", count, one_line(error))
            return
        if right and taken_s <= wanted_s:
            self._graphs[count, reach] = graph
        else:
            logger.info("steps of %s sessions that see %s positions run without a graph", count, reach)


class _Graph:
    def __init__(self, rows: Rows, repeat: Callable[[], None], output_1TH: Tensor) -> None:
        self._rows, self.repeat, self.output_1TH = rows, repeat, output_1TH

    def __call__(self, hidden_1TH: Tensor, tables: Sequence[Sequence[Segment]]) -> Tensor | None:
        if not self._rows.load(hidden_1TH, tables):
            return None
        self.repeat()
        return self.output_1TH[:, : hidden_1TH.shape[1]]


def recorder_for(device: torch.device) -> Record | None:
    """What records on this device; None where there are no graphs. Its graphs share one memory, so that only one of
    them may run at a time, and they take as much as the largest of them."""
    if device.type != "cuda":
        return None
    return functools.partial(_record_on, device, torch.cuda.graph_pool_handle())


def _record_on(device: torch.device, memory: Any, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `run`, made as torch's notes on CUDA semantics say: warmed up on a stream of its own."""
    with torch.cuda.device(device):
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            run()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # what other threads do with their devices meanwhile is none of its business
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            output = run()
        graph.replay()
        return graph.replay, output


_HOST = torch.empty(0)


def _on_host(values: Sequence[object]) -> Tensor:
    tensor = torch.tensor(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _filled(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [*runs, *[(0, 0)] * (RUNS - len(runs))]


def _slot_bytes(pool: LayerPool) -> int:
    """Of one position's keys and values in a layer."""
    return sum(t.shape[1] * t.shape[3] * t.itemsize for t in (pool.keys_1JSK, pool.values_1JSV))


def _bucket(buckets: Sequence[int], least: int) -> int:
    return next(bucket for bucket in buckets if bucket >= least)


def fastest_s(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs, until the device has ended it."""
    seconds = []
    for _ in range(TRIALS):
        began_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)
