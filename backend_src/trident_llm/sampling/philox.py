"""Counter-based random numbers: the same (seed, sample, position) gives the same number on every device and restart.

Philox 4x32 with 10 rounds: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds on counters [4, N] under keys [2, N]; every entry below 2**32, as are the results [4, N]."""
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(10):
        low0, low1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (low1 >> _SHIFT) ^ c1 ^ k0, low1 & _LOW, (low0 >> _SHIFT) ^ c3 ^ k1, low0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(seeds: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """[N] numbers in [0, 1) with 32 random bits. ``seeds`` are taken modulo 2**64."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    zero = np.zeros_like(seed)
    counters = np.stack([np.array(positions, dtype=np.uint64), np.array(samples, dtype=np.uint64), zero, zero])
    return philox(counters, np.stack([seed & _LOW, seed >> _SHIFT]))[0] * 2.0**-32
