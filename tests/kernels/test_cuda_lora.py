"""Low-rank updates in the Triton language, and their torch twin, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.fakes.lora_problems import LoraProblem, lora_rows, make_problem, mixed_weights
from tests.kernels.cuda_cases import DEVICE, DTYPES, PDL, assert_close, random_tensor
from trident_llm.kernels.lora import LoraConfig, expand, shrink, updates
from trident_llm.kernels.triton_language import TritonLanguageKernels

pytestmark = pytest.mark.gpu

RANKS = (16, 3, 0, 24)


def add_lora(problem: LoraProblem, config: LoraConfig | None = None) -> None:
    hidden = shrink(problem.x, problem.layer, problem.rows, config=config, pdl=PDL)
    expand(problem.y, problem.bias, hidden, problem.layer, problem.rows, config=config, pdl=PDL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part_sizes", [(48, 16, 16), (96, 96), (130,)], ids=["qkv", "gate-up", "o"])
def test_rows_of_many_mixes(part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = make_problem(
        mixed_weights(37, 4), ranks=RANKS, part_sizes=part_sizes, dtype=dtype, device=DEVICE, num_inputs=300
    )
    add_lora(problem)
    assert_close(problem.y, problem.expected)


def test_each_part_has_weights_of_its_own() -> None:
    problem = make_problem(mixed_weights(20, 4, num_parts=5), ranks=RANKS, device=DEVICE, first_target=2)
    add_lora(problem)
    assert_close(problem.y, problem.expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gains_scale_the_product_without_its_bias(with_bias: bool) -> None:
    problem = make_problem(mixed_weights(19, 4), ranks=RANKS, device=DEVICE, gained=(0, 3), with_bias=with_bias)
    add_lora(problem)
    assert_close(problem.y, problem.expected)


@pytest.mark.parametrize("config", [LoraConfig(1024, 64, 1), LoraConfig(2048, 32, 2), LoraConfig(4096, 128, 8)])
def test_results_do_not_depend_on_the_tiles(config: LoraConfig) -> None:
    problem = make_problem(mixed_weights(33, 4), ranks=RANKS, device=DEVICE, num_inputs=2300)
    add_lora(problem, config)
    assert_close(problem.y, problem.expected)


def test_rows_without_slots_keep_every_bit() -> None:
    weights = torch.zeros(1, 18, 4)
    problem = make_problem(weights, ranks=RANKS, device=DEVICE)
    before = problem.y.clone()
    add_lora(problem)
    assert torch.equal(problem.y, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_with_updates(dtype: torch.dtype) -> None:
    """On a GPU part of it runs on a stream of its own."""
    problem = make_problem(mixed_weights(33, 4), ranks=RANKS, dtype=dtype, device=DEVICE, gained=(0,), with_bias=True)
    weight = torch.randn(problem.y.shape[1], problem.x.shape[1], generator=torch.Generator().manual_seed(1))
    weight = weight.to(DEVICE, dtype)
    side_stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    kernels = TritonLanguageKernels(num_processors=16, pdl=PDL, side_stream=side_stream)
    base = kernels.linear(problem.x, weight, problem.bias)
    expected = replace(problem, y=base.clone())
    add_lora(expected)
    assert not torch.equal(base, expected.y)
    found = kernels.linear_lora(problem.x, weight, problem.bias, problem.layer, problem.rows)
    assert torch.equal(found, expected.y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [17, 33])
def test_updates_that_come_apart(num_rows: int, dtype: torch.dtype) -> None:
    """Added later they make the same bits; rows that take nothing get zeros."""
    weights = mixed_weights(num_rows, 4)
    weights[:, 16:32] = 0
    problem = make_problem(weights, ranks=RANKS, part_sizes=(96, 96), dtype=dtype, device=DEVICE, num_inputs=300)
    hidden = shrink(problem.x, problem.layer, problem.rows, pdl=PDL)
    update = updates(hidden, problem.layer, problem.rows, pdl=PDL)
    expected = (problem.y.float() + update).to(dtype)
    assert not update[16:32].any() and update[:16].any()
    add_lora(problem)
    assert torch.equal(problem.y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("may_have_gains", [False, True])
@pytest.mark.parametrize("num_rows", [1, 33])
def test_what_follows_adds_the_updates(num_rows: int, may_have_gains: bool, dtype: torch.dtype) -> None:
    problem = make_problem(
        mixed_weights(num_rows, 4), ranks=RANKS, part_sizes=(64, 64), dtype=dtype, device=DEVICE, num_inputs=128,
        gained=(0,) if may_have_gains else (),
    )  # fmt: skip
    rows = replace(problem.rows, may_have_gains=may_have_gains)
    weight = random_tensor(128, 128, dtype=dtype, scale=0.1)
    norm_weight, residual = random_tensor(128, dtype=dtype, seed=2), random_tensor(num_rows, 128, dtype=dtype, seed=3)
    side_stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    kernels = TritonLanguageKernels(num_processors=16, pdl=PDL, side_stream=side_stream)
    whole = kernels.linear_lora(problem.x, weight, None, problem.layer, rows)
    activated = kernels.linear_lora_silu_and_mul(problem.x, weight, None, problem.layer, rows)
    assert torch.equal(activated, kernels.silu_and_mul(whole))
    total = residual.clone()
    normed = kernels.linear_lora_add_rms_norm(
        problem.x, weight, None, problem.layer, rows, total, norm_weight, 1e-5
    )
    assert_close(total, residual.float() + whole.float())
    assert_close(normed, torch.rms_norm(total.float(), (128,), norm_weight.float(), 1e-5))


def test_operands_that_do_not_fit_are_refused() -> None:
    problem = make_problem(mixed_weights(4, 4), ranks=RANKS, device=DEVICE)
    with pytest.raises(ValueError, match="tile_slots"):
        add_lora(replace(problem, rows=lora_rows(problem.rows.weights[..., :3].contiguous())))
    with pytest.raises(TypeError, match="float16"):
        add_lora(replace(problem, x=problem.x.half()))
