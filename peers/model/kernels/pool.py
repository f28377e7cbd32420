"""The library's products, as functions of tensors.

Owns the threads that make them. Knows no modules.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from array import array
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from peers.model.kernels.build import NoLibrary, library

logger = logging.getLogger(__name__)

GROUP = 32
"""Weights with 4 bits that share a scale; as in linear.cpp."""
INPUTS = (torch.float32, torch.bfloat16)
"""Dtypes of inputs and outputs, by the library's numbers for them."""
WEIGHTS = ("", "int8", "int4", "nf4")
"""Formats of weights, likewise; "" for the input's dtype."""


class Visits(msgspec.Struct, frozen=True, eq=False):
    """What some rows of a forward attend to; the same for every layer that sees alike.

    Arrays of 64-bit integers, because to make a tensor of a few numbers takes torch ten times as long.
    """

    segments: array[int]
    """Four numbers for each segment: first row, rows, first run, runs. The rows are the last positions of those runs,
    each seeing itself and what came before."""
    runs: array[int]
    """Two for each run: first slot, slots; of each segment in order."""
    positions: int
    """Of all segments together."""
    slots: array[int]
    """Where the keys and values of each of the forward's positions go."""

    def words(self) -> tuple[int, int, int, int, int]:
        """The library's structure, good for as long as this object is."""
        return (
            self.segments.buffer_info()[0],
            len(self.segments) // 4,
            self.runs.buffer_info()[0],
            self.positions,
            self.slots.buffer_info()[0],
        )


class Pool:
    """The library's threads in one process, and what they can be asked to do."""

    def __init__(self, threads: int) -> None:
        """Raises NoLibrary."""
        self._linear, self._unpack = library().hive_linear, library().hive_unpack
        self._attend, self._run = library().hive_attend, library().hive_run
        self._pool = ctypes.c_void_p(library().hive_pool(threads))
        if not self._pool:
            raise NoLibrary(f"{threads} threads could not be started")
        weakref.finalize(self, library().hive_pool_end, self._pool).atexit = False  # the threads end with the process

    def __deepcopy__(self, memo: object) -> Pool:
        return self  # modules are copied for parts of a span; threads are not

    def linear(
        self,
        input_xK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        scales: Tensor | None = None,
        format_name: str = "",
    ) -> Tensor:
        """`F.linear` of contiguous tensors on the CPU, [..., N] in the input's dtype; the bias is float32.

        With a format, `weight_NK` and `scales` are what `peers.model.kernels.packed.packed` returns.
        """
        N, K = len(weight_NK), input_xK.shape[-1]
        output_xN = input_xK.new_empty((*input_xK.shape[:-1], N))
        self._linear(
            self._pool,
            INPUTS.index(input_xK.dtype),
            WEIGHTS.index(format_name),
            input_xK.data_ptr(),
            weight_NK.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias_N is None else bias_N.data_ptr(),
            output_xN.data_ptr(),
            input_xK.numel() // K,
            N,
            K,
        )
        return output_xN

    def unpack(self, codes: Tensor, scales: Tensor, format_name: str, inputs: int, dtype: torch.dtype) -> Tensor:
        """[N, K = `inputs`]: `peers.model.kernels.packed.whole` of contiguous tensors on the CPU, in one of INPUTS."""
        weight_NK = torch.empty(len(codes), inputs, dtype=dtype)
        self._unpack(
            self._pool,
            INPUTS.index(dtype),
            WEIGHTS.index(format_name),
            codes.data_ptr(),
            scales.data_ptr(),
            weight_NK.data_ptr(),
            *weight_NK.shape,
        )
        return weight_NK

    def attend(
        self,
        q_1HTK: Tensor,
        keys_1JSK: Tensor,
        values_1JSV: Tensor,
        out_THV: Tensor,
        visits: Visits,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> None:
        """Attention of the rows that `visits` names, written to those rows of `out_THV`; float32 or bfloat16.

        Keys and values may be parts of wider rows.
        """
        _, H, _, K = q_1HTK.shape
        _, J, _, V = values_1JSV.shape
        if q_1HTK.stride(3) != 1:
            q_1HTK = q_1HTK.contiguous()
        sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        segments, num_segments, runs, positions, _ = visits.words()
        self._attend(
            self._pool,
            INPUTS.index(q_1HTK.dtype),
            q_1HTK.data_ptr(),
            keys_1JSK.data_ptr(),
            values_1JSV.data_ptr(),
            out_THV.data_ptr(),
            segments,
            num_segments,
            runs,
            None if sinks_H is None else sinks_H.data_ptr(),
            *(H, J, K, V, q_1HTK.stride(1), q_1HTK.stride(2)),
            *(keys_1JSK.stride(1), keys_1JSK.stride(2), values_1JSV.stride(1), values_1JSV.stride(2)),
            scale,
            softcap or 0.0,
            positions,
        )

    def run(self, code: Tensor, bases: Sequence[int], visits: Sequence[Visits]) -> None:
        """Carry out the instructions of `tape.cpp`, whose operands lie relative to the addresses `bases`."""
        places, seen = array("q", bases), array("q")
        for each in visits:
            seen.extend(each.words())
        self._run(self._pool, code.data_ptr(), code.shape[0], places.buffer_info()[0], seen.buffer_info()[0])


def pool_for(device: torch.device, threads: int) -> Pool | None:
    """The library's threads for a module on `device`; None, and one line in the log, where it cannot be had."""
    if device.type != "cpu":
        return None
    try:
        return Pool(threads)
    except NoLibrary as error:
        logger.info("linear layers and attention run at torch's speed, not at memory's: %s", error)
        return None
