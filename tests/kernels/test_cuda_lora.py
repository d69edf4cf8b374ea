"""Low-rank updates in the Triton language, and their torch twin, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.lora_problems import lora_rows, make_problem, mixed_weights
from tests.kernels.cuda_cases import DEVICE, DTYPES, PDL, assert_close
from trident_llm.kernels.lora import LoraConfig, add_lora
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_with_updates(dtype: torch.dtype) -> None:
    """On a GPU part of it runs on a stream of its own."""
    problem = make_problem(mixed_weights(33, 4), ranks=RANKS, dtype=dtype, device=DEVICE, gained=(0,), with_bias=True)
    weight = torch.randn(problem.y.shape[1], problem.x.shape[1], generator=torch.Generator().manual_seed(1))
    weight = weight.to(DEVICE, dtype)
    side_stream = torch.cuda.Stream() if DEVICE == "cuda" else None
    kernels = TritonLanguageKernels(num_processors=16, pdl=PDL, side_stream=side_stream)
    base = kernels.linear(problem.x, weight, problem.bias)
    expected = base.clone()
    add_lora(expected, problem.x, problem.bias, problem.layer, problem.rows, pdl=PDL)
    assert not torch.equal(base, expected)
    found = kernels.linear_lora(problem.x, weight, problem.bias, problem.layer, problem.rows)
    assert torch.equal(found, expected)


def test_operands_that_do_not_fit_are_refused() -> None:
    problem = make_problem(mixed_weights(4, 4), ranks=RANKS, device=DEVICE)
    with pytest.raises(ValueError, match="tile_slots"):
        add_lora(problem.y, problem.x, None, problem.layer, lora_rows(problem.rows.weights[..., :3].contiguous()))
    with pytest.raises(TypeError, match="float16"):
        add_lora(problem.y, problem.x.half(), None, problem.layer, problem.rows)
