"""The summary of a GPU trace: steps, the gaps between them, and kernels that overlap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "load_tests"))

from profile_steps import Activity, step_times


def steps(count):
    """14 us each: a copy after 2, a product from 4 to 10 that its successor overlaps, a draw to the end."""
    activities = []
    for start in range(0, 14 * count, 14):
        activities += [
            Activity("Memcpy HtoD (Pinned -> Device)", start + 2, start + 3),
            Activity("void gemm<int>(float)", start + 4, start + 10),
            Activity("_rms_norm_kernel", start + 9, start + 12),
            Activity("_sample_tokens_kernel", start + 12, start + 14),
        ]
    return activities


def test_a_step_ends_with_its_draw_and_overlap_counts_once():
    times = step_times(steps(8))
    assert times.step == 14
    assert times.idle == times.gap == 3
    assert times.kernels == {"gemm": 6, "_rms_norm_kernel": 2, "_sample_tokens_kernel": 2, "Memcpy HtoD ": 1}
    assert sum(times.kernels.values()) + times.idle == pytest.approx(times.step)


def test_time_without_work_inside_a_step_is_idle_but_no_gap():
    activities = [a if a.name != "_rms_norm_kernel" else Activity(a.name, a.start + 2, a.end) for a in steps(8)]
    times = step_times(activities)
    assert times.gap == 3 and times.idle == 4
