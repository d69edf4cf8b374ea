"""The torch twin of the low-rank updates against the formula in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.fakes.lora_problems import make_problem, mixed_weights
from trident_llm.kernels.lora_layer import SlotRun
from trident_llm.kernels.reference_lora import add_lora

RANKS = (16, 3, 0, 24)
MAX_ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_parts", [1, 5])
def test_mixed_rows(num_parts: int, with_bias: bool, dtype: torch.dtype) -> None:
    problem = make_problem(
        mixed_weights(21, 4, num_parts), ranks=RANKS, dtype=dtype, gained=(1,), with_bias=with_bias,
        first_target=2 if num_parts > 1 else 9,
    )  # fmt: skip
    add_lora(problem.y, problem.x, problem.bias, problem.layer, problem.rows)
    error = (problem.y.double() - problem.expected).norm() / problem.expected.norm()
    assert error <= MAX_ERRORS[dtype]


def test_runs_of_rows_with_one_weight() -> None:
    weights = torch.zeros(1, 8, 4)
    weights[0, 1:4, 0] = 0.7
    weights[0, 2:7, 3] = -0.4
    problem = make_problem(weights, ranks=RANKS, gained=(3,))
    runs = (SlotRun(0, 1, 4, 0.7), SlotRun(3, 2, 7, -0.4), SlotRun(1, 0, 8, 0.0))
    add_lora(
        problem.y, problem.x, None, problem.layer, dataclasses.replace(problem.rows, runs=runs)
    )
    assert (problem.y.double() - problem.expected).norm() / problem.expected.norm() <= 2e-6


def test_a_slot_that_was_cleared_adds_nothing() -> None:
    problem = make_problem(mixed_weights(6, 4), ranks=RANKS)
    before = problem.y.clone()
    for slot in range(4):
        problem.layer.clear(slot)
    add_lora(problem.y, problem.x, None, problem.layer, problem.rows)
    assert torch.equal(problem.y, before)
