"""Random numbers without state: each is a function of a key and a counter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

UInt64s = npt.NDArray[np.uint64]


def philox4x32(keys: UInt64s, low: UInt64s, high: UInt64s) -> tuple[UInt64s, UInt64s]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        keys: [n].
        low: [n]; the lower half of each 128-bit counter.
        high: [n]; the upper half.

    Returns:
        two arrays [n] of 64-bit numbers, the first of which holds the generator's first two words.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None]
    key_steps = np.array(_KEY_STEPS, dtype=np.uint64)[:, None]
    # [2, n] each: words 0 and 2 of the counter, words 1 and 3, both words of the key.
    even = np.stack((low, high)) & mask
    odd = np.stack((low, high)) >> half
    key = np.stack((keys & mask, keys >> half))
    for _ in range(_ROUNDS):
        product = even * multipliers
        even = (product >> half)[::-1] ^ odd ^ key
        odd = (product & mask)[::-1]
        key = (key + key_steps) & mask
    words = odd << half | even
    return words[0], words[1]


def uniforms(keys: list[int], positions: list[int], streams: list[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) of 53 bits for each key, position and stream, all taken modulo 2^64."""
    words, _ = philox4x32(_uint64s(keys), _uint64s(positions), _uint64s(streams))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _uint64s(values: list[int]) -> UInt64s:
    return np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], dtype=np.uint64)
