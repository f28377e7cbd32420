"""Linear layers and attention at the speed of memory on a CPU: a small C++ library, made on first use."""

from peers.model.kernels.linear import (
    FastLinear,
    accelerate,
    accelerate_by_torch,
    accelerating,
    accelerating_by_torch,
)
from peers.model.kernels.packed import PackedLinear
from peers.model.kernels.pool import Pool, Visits, pool_for

__all__ = [
    "FastLinear",
    "PackedLinear",
    "Pool",
    "Visits",
    "accelerate",
    "accelerate_by_torch",
    "accelerating",
    "accelerating_by_torch",
    "pool_for",
]
