from __future__ import annotations

import numpy as np
import pytest

from nano_vllm.sampling.philox import philox4x32, uniforms

ONES = 2**64 - 1


@pytest.mark.parametrize(
    ("key", "low", "high", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES, ONES, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    key: int, low: int, high: int, words: tuple[int, int, int, int]
) -> None:
    arrays = [np.array([value], dtype=np.uint64) for value in (key, low, high)]
    first, second = philox4x32(*arrays)
    assert int(first[0]) == words[1] << 32 | words[0]
    assert int(second[0]) == words[3] << 32 | words[2]


def test_uniforms_fill_the_unit_interval() -> None:
    n = 100_000
    draws = uniforms([7] * n, list(range(n)), [0] * n)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 170  # 99 degrees of freedom, p > 1e-5


def test_key_position_and_stream_all_count() -> None:
    draws = uniforms([1, 2, 1, 1, -1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0])
    assert len(set(draws.tolist())) == 5
    assert uniforms([2**64 - 1], [0], [0]) == draws[4:]
    assert uniforms([1], [1], [0]) == draws[2:3]
