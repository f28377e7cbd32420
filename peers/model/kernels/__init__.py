"""Linear layers at the speed of memory on a CPU: a small C++ library, made on first use, beside torch's own."""

from peers.model.kernels.linear import FastLinear, accelerate

__all__ = ["FastLinear", "accelerate"]
