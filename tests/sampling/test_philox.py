import numpy as np
import pytest

from trident_llm.sampling.philox import philox, uniform

# Known answers published with the algorithm's reference implementation (Random123, kat_vectors).
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    counters = np.array(counter, dtype=np.uint64)[:, None]
    assert philox(counters, np.array(key, dtype=np.uint64)[:, None])[:, 0].tolist() == expected


def test_a_number_depends_on_seed_sample_and_position_alone():
    alone = uniform([7], [1], [42])[0]
    assert uniform([3, 7, 7], [0, 1, 0], [1, 42, 42])[1] == alone
    numbers = {*uniform([7] * 3, [1, 1, 2], [42, 43, 42]).tolist(), *uniform([8, -1], [1, 1], [42, 42]).tolist()}
    assert len(numbers) == 5


def test_numbers_are_uniform():
    numbers = uniform([11] * 20000, [0] * 20000, range(20000))
    counts, _ = np.histogram(numbers, bins=20, range=(0.0, 1.0))
    # 19 degrees of freedom: the chi-square statistic stays below 43.8 with probability 0.999.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
