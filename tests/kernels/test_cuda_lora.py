"""Low-rank updates in the Triton language, and their torch twin, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.fakes.lora_problems import LoraProblem, expected_sum, lora_rows, make_problem, mixed_weights
from tests.kernels.cuda_cases import DEVICE, DTYPES, HALF_DTYPES, MAX_ERRORS, PDL, assert_close, random_tensor
from trident_llm.kernels.lora import LoraConfig, add_lora
from trident_llm.kernels.lora_layer import LoraLayer, allocate_lora_layer
from trident_llm.kernels.lora_updates import takes_updates
from trident_llm.kernels.triton_language import TritonLanguageKernels

pytestmark = pytest.mark.gpu

RANKS = (16, 3, 0, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part_sizes", [(48, 16, 16), (96, 96), (130,)], ids=["qkv", "gate-up", "o"])
def test_rows_of_many_mixes(part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = make_problem(
        mixed_weights(37, 4), ranks=RANKS, part_sizes=part_sizes, dtype=dtype, device=DEVICE, num_inputs=300
    )
    add_lora(problem.y, problem.x, None, problem.layer, problem.rows, pdl=PDL)
    assert_close(problem.y, problem.expected)


def test_each_part_has_weights_of_its_own() -> None:
    problem = make_problem(mixed_weights(20, 4, num_parts=5), ranks=RANKS, device=DEVICE, first_target=2)
    add_lora(problem.y, problem.x, None, problem.layer, problem.rows, pdl=PDL)
    assert_close(problem.y, problem.expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gains_scale_the_product_without_its_bias(with_bias: bool) -> None:
    problem = make_problem(mixed_weights(19, 4), ranks=RANKS, device=DEVICE, gained=(0, 3), with_bias=with_bias)
    add_lora(problem.y, problem.x, problem.bias, problem.layer, problem.rows, pdl=PDL)
    assert_close(problem.y, problem.expected)


@pytest.mark.parametrize("config", [LoraConfig(1024, 64, 1), LoraConfig(2048, 32, 2), LoraConfig(4096, 128, 8)])
def test_results_do_not_depend_on_the_tiles(config: LoraConfig) -> None:
    problem = make_problem(mixed_weights(33, 4), ranks=RANKS, device=DEVICE, num_inputs=2300)
    add_lora(problem.y, problem.x, None, problem.layer, problem.rows, config=config, pdl=PDL)
    assert_close(problem.y, problem.expected)


def test_rows_without_slots_keep_every_bit() -> None:
    weights = torch.zeros(1, 18, 4)
    problem = make_problem(weights, ranks=RANKS, device=DEVICE)
    before = problem.y.clone()
    add_lora(problem.y, problem.x, None, problem.layer, problem.rows, pdl=PDL)
    assert torch.equal(problem.y, before)


def layer_problem(num_rows: int, part_sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> LoraProblem:
    return make_problem(
        mixed_weights(num_rows, 4), ranks=RANKS, part_sizes=part_sizes, dtype=dtype, device=DEVICE, num_inputs=150,
        **options,
    )  # fmt: skip


def layer_weight(problem: LoraProblem) -> torch.Tensor:
    shape = problem.y.shape[1], problem.x.shape[1]
    return random_tensor(*shape, dtype=problem.x.dtype, seed=1, scale=0.1)


def updated(problem: LoraProblem, weight: torch.Tensor) -> torch.Tensor:
    """The layer's outputs in float64."""
    product = problem.x.double() @ weight.double().T
    whole = replace(problem, y=product if problem.bias is None else product + problem.bias.double())
    return expected_sum(whole, RANKS)


def make_kernels() -> TritonLanguageKernels:
    side_stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    return TritonLanguageKernels(num_processors=16, pdl=PDL, side_stream=side_stream)


# From one kernel's rows to the other's: 8 and fewer, then products that updates join, then cuBLAS.
@pytest.mark.parametrize("num_rows", [5, 9, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_with_updates(dtype: torch.dtype, num_rows: int) -> None:
    """On a GPU part of it runs on a stream of its own, or beside the product."""
    problem = layer_problem(num_rows, (128, 64, 64), dtype, gained=(0,), with_bias=True)
    weight = layer_weight(problem)
    found = make_kernels().linear_lora(problem.x, weight, problem.bias, problem.layer, problem.rows)
    assert_close(found, updated(problem, weight))


@pytest.mark.parametrize("part_sizes", [(64, 64), (48, 48)], ids=["tiles", "other sizes"])
@pytest.mark.parametrize("num_rows", [17, 100])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_silu_of_a_layer_with_updates(dtype: torch.dtype, num_rows: int, part_sizes: tuple[int, ...]) -> None:
    problem = layer_problem(num_rows, part_sizes, dtype, gained=(3,))
    problem = replace(problem, x=problem.x * 0.1)
    weight = layer_weight(problem)
    found = make_kernels().linear_lora_silu_and_mul(problem.x, weight, None, problem.layer, problem.rows)
    gate, up = updated(problem, weight).chunk(2, -1)
    assert_close(found, torch.nn.functional.silu(gate) * up, 2 * MAX_ERRORS[dtype])


@pytest.mark.parametrize("gained", [(), (0, 3)])
@pytest.mark.parametrize("num_rows", [5, 17, 70])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_norm_after_a_layer_with_updates(dtype: torch.dtype, num_rows: int, gained: tuple[int, ...]) -> None:
    problem = layer_problem(num_rows, (128,), dtype, gained=gained)
    weight = layer_weight(problem)
    residual = random_tensor(num_rows, 128, dtype=dtype, seed=2)
    norm = random_tensor(128, dtype=dtype, seed=3)
    total = residual.double() + updated(problem, weight)
    found = make_kernels().linear_lora_add_rms_norm(
        problem.x, weight, None, residual, norm, 1e-5, problem.layer, problem.rows
    )
    assert_close(residual, total)
    scale = (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_close(found, total * scale * norm.double(), 2 * MAX_ERRORS[dtype])


def test_a_product_that_updates_join_keeps_every_bit_of_rows_without_slots() -> None:
    problem = make_problem(
        torch.zeros(1, 18, 4), ranks=RANKS, part_sizes=(128,), dtype=torch.float16, device=DEVICE
    )
    weight, kernels = layer_weight(problem), make_kernels()
    found = kernels.linear_lora(problem.x, weight, None, problem.layer, problem.rows)
    assert torch.equal(found, kernels.linear(problem.x, weight))


def test_products_that_updates_join_have_whole_tiles_and_not_too_many_ranks() -> None:
    def layer(*part_sizes: int, num_slots: int = 4, max_rank: int = 8) -> LoraLayer:
        return allocate_lora_layer(
            part_sizes, 64, first_target=0, num_slots=num_slots, max_rank=max_rank, dtype=torch.float16,
            device=torch.device(DEVICE),
        )  # fmt: skip

    assert takes_updates(layer(128, 64, 64), 64)
    assert not takes_updates(layer(128, 48), 64)
    assert takes_updates(layer(64, num_slots=63), 64)
    assert not takes_updates(layer(64, num_slots=64), 64)
    assert takes_updates(layer(64, num_slots=15, max_rank=64), 64)
    assert not takes_updates(layer(64, num_slots=16, max_rank=64), 64)


def test_operands_that_do_not_fit_are_refused() -> None:
    problem = make_problem(mixed_weights(4, 4), ranks=RANKS, device=DEVICE)
    with pytest.raises(ValueError, match="tile_slots"):
        add_lora(problem.y, problem.x, None, problem.layer, lora_rows(problem.rows.weights[..., :3].contiguous()))
    with pytest.raises(TypeError, match="float16"):
        add_lora(problem.y, problem.x.half(), None, problem.layer, problem.rows)
