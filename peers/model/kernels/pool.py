"""The library's products, as functions of tensors.

Owns the threads that make them. Knows no modules.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from peers.model.kernels.build import NoLibrary, library

KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float32, torch.int8): 2,
    (torch.bfloat16, torch.int8): 3,
}
"""What the library calls a pair of dtypes: of the input (and the output), and of the weights."""


class Pool:
    """The threads of the library's products in this process."""

    def __init__(self, threads: int) -> None:
        """Raises NoLibrary."""
        self._linear = library().hive_linear
        self._pool = ctypes.c_void_p(library().hive_pool(threads))
        if not self._pool:
            raise NoLibrary(f"{threads} threads could not be started")
        weakref.finalize(self, library().hive_pool_end, self._pool).atexit = False  # the threads end with the process

    def __deepcopy__(self, memo: object) -> Pool:
        return self  # modules are copied for parts of a span; threads are not

    def linear(
        self, input_xK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, scale_N: Tensor | None = None
    ) -> Tensor:
        """`F.linear` of contiguous tensors on the CPU, [..., N] in the input's dtype; bias and scale are float32.

        With `scale_N` the weights are `weight * scale`.
        """
        N, K = weight_NK.shape
        output_xN = input_xK.new_empty((*input_xK.shape[:-1], N))
        self._linear(
            self._pool,
            KINDS[input_xK.dtype, weight_NK.dtype],
            input_xK.data_ptr(),
            weight_NK.data_ptr(),
            None if scale_N is None else scale_N.data_ptr(),
            None if bias_N is None else bias_N.data_ptr(),
            output_xN.data_ptr(),
            input_xK.numel() // K,
            N,
            K,
        )
        return output_xN
