"""Products with 16-bit weights by warps of different duties, and low-rank updates in them, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.fakes.lora_problems import LoraProblem, expected_sum, make_problem, mixed_weights
from tests.kernels.cuda_cases import (
    DEVICE,
    HALF_DTYPES,
    INTERPRETED,
    MAX_ERRORS,
    PDL,
    RUNS_HOPPER_KERNELS,
    assert_close,
    poisoned,
    random_tensor,
)
from trident_llm.kernels.lora_updates import Updates
from trident_llm.kernels.matmul_hopper import HopperProductConfig, matmul_hopper, takes
from trident_llm.kernels.triton_language import TritonLanguageKernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS_HOPPER_KERNELS, reason="kernels of Hopper")]
DTYPES = [torch.float16, torch.bfloat16]
KERNELS = TritonLanguageKernels(num_processors=132, pdl=PDL, hopper=True)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    """Outputs and inputs."""
    num_rows: int
    config: HopperProductConfig


CASES = [
    # Rows, outputs and inputs that end within a tile, a panel and a stage; one group of warps and two.
    Case((320, 320), 10, HopperProductConfig(1, 1, 16, 20)),
    Case((500, 520), 20, HopperProductConfig(1, 2, 32, 3)),
    Case((576, 520), 64, HopperProductConfig(1, 4, 64, 3)),
    Case((576, 512), 100, HopperProductConfig(2, 1, 128, 6)),
    Case((576, 512), 300, HopperProductConfig(2, 2, 128, 4)),
    Case((500, 576), 300, HopperProductConfig(2, 1, 256, 4)),
]


@pytest.mark.parametrize("processors", [3] if INTERPRETED else [132, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case: Case, dtype: torch.dtype, processors: int) -> None:
    """With fewer processors than tiles programs take several."""
    (num_outputs, num_inputs), num_rows = case.shape, case.num_rows
    x = random_tensor(num_rows, num_inputs + 64, dtype=dtype)[:, :num_inputs]
    weight = random_tensor(num_outputs, num_inputs, dtype=dtype, seed=1)
    bias = random_tensor(num_outputs, dtype=dtype, seed=2)
    assert takes(x, weight)
    out = poisoned(num_rows, num_outputs, dtype=dtype)
    matmul_hopper(x, weight, out, bias=bias, num_processors=processors, config=case.config, pdl=PDL)
    assert_close(out, product(x, weight) + bias.double())


@pytest.mark.parametrize("processors", [5] if INTERPRETED else [132, 5])
@pytest.mark.parametrize("num_splits", [2, 3, 8])
@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_splits_of_a_sum(case: Case, num_splits: int, processors: int) -> None:
    (num_outputs, num_inputs), num_rows = case.shape, case.num_rows
    x = random_tensor(num_rows, num_inputs, dtype=torch.bfloat16)
    weight = random_tensor(num_outputs, num_inputs, dtype=torch.bfloat16, seed=1)
    parts = poisoned(num_splits, num_rows, num_outputs, dtype=torch.float32)
    config = replace(case.config, num_splits=num_splits)
    matmul_hopper(x, weight, parts, num_processors=processors, config=config, pdl=PDL)
    assert_close(parts.sum(0), product(x, weight), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [3, 33, 64, 100])
def test_silu_and_mul(num_rows: int, dtype: torch.dtype) -> None:
    weight, x = random_tensor(640, 512, dtype=dtype, seed=1, scale=0.1), random_tensor(num_rows, 512, dtype=dtype)
    gate, up = product(x, weight).to(dtype).double().chunk(2, -1)
    assert_close(KERNELS.linear_silu_and_mul(x, weight), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [3, 64, 100])
def test_norm_after_a_product(num_rows: int, dtype: torch.dtype) -> None:
    x, weight = random_tensor(num_rows, 320, dtype=dtype), random_tensor(192, 320, dtype=dtype, seed=1, scale=0.1)
    residual, norm = random_tensor(num_rows, 192, dtype=dtype, seed=2), random_tensor(192, dtype=dtype, seed=3)
    total = residual.double() + product(x, weight)
    found = KERNELS.linear_add_rms_norm(x, weight, None, residual, norm, 1e-5)
    assert_close(residual, total)
    assert_close(found, normed(total, norm), 2 * MAX_ERRORS[dtype])


RANKS = (16, 8, 0, 24)
UPDATED = [(1, ()), (40, (0, 3))] if INTERPRETED else [(n, gained) for n in (1, 40, 100) for gained in ((), (0, 3))]
"""Rows, and slots with gains."""


def layer_problem(num_rows: int, part_sizes: tuple[int, ...], gained: tuple[int, ...]) -> tuple[LoraProblem, Tensor]:
    """Updates of a layer, of which no row takes the second, and the layer's weight."""
    weights = mixed_weights(num_rows, len(RANKS))
    weights[:, :, 1] = 0
    problem = make_problem(
        weights, ranks=RANKS, part_sizes=part_sizes, dtype=torch.float16, device=DEVICE, num_inputs=200, gained=gained
    )
    weight = random_tensor(sum(part_sizes), 200, dtype=torch.float16, seed=1, scale=0.1)
    return replace(problem, x=problem.x * 0.1), weight


def updated(problem: LoraProblem, weight: Tensor) -> Tensor:
    return expected_sum(replace(problem, y=product(problem.x, weight)), RANKS)


@pytest.mark.parametrize(("num_rows", "gained"), UPDATED)
def test_a_product_with_updates(num_rows: int, gained: tuple[int, ...]) -> None:
    problem, weight = layer_problem(num_rows, (128, 64, 64), gained)
    found = KERNELS.linear_lora(problem.x, weight, None, problem.layer, problem.rows)
    assert_close(found, updated(problem, weight))


@pytest.mark.parametrize(("num_rows", "gained"), UPDATED)
def test_silu_of_a_product_with_updates(num_rows: int, gained: tuple[int, ...]) -> None:
    problem, weight = layer_problem(num_rows, (128, 128), gained)
    gate, up = updated(problem, weight).to(torch.float16).double().chunk(2, -1)
    found = KERNELS.linear_lora_silu_and_mul(problem.x, weight, None, problem.layer, problem.rows)
    assert_close(found, torch.nn.functional.silu(gate) * up, 2 * MAX_ERRORS[torch.float16])


@pytest.mark.parametrize(("num_rows", "gained"), UPDATED)
def test_norm_after_a_product_with_updates(num_rows: int, gained: tuple[int, ...]) -> None:
    problem, weight = layer_problem(num_rows, (256,), gained)
    residual = random_tensor(num_rows, 256, dtype=torch.float16, seed=2)
    norm = random_tensor(256, dtype=torch.float16, seed=3)
    total = residual.double() + updated(problem, weight)
    found = KERNELS.linear_lora_add_rms_norm(
        problem.x, weight, None, residual, norm, 1e-5, problem.layer, problem.rows
    )
    assert_close(residual, total)
    assert_close(found, normed(total, norm), 2 * MAX_ERRORS[torch.float16])


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = random_tensor(20, 72, dtype=torch.float16), random_tensor(96, 72, dtype=torch.float16)
    out, config = poisoned(20, 96, dtype=torch.float16), HopperProductConfig(1, 1, 32, 4)
    assert not takes(x.float(), weight)
    assert not takes(x[:, 1:], weight[:, 1:])
    assert not takes(x, weight, silu_and_mul=True)
    with pytest.raises(ValueError, match="strides"):
        matmul_hopper(x[:, 4:68], weight[:, :64], out, num_processors=132, config=config)
    with pytest.raises(ValueError, match="pairs of panels, not 1"):
        matmul_hopper(x, weight[:64].repeat(2, 1), out[:, :64], silu_and_mul=True, num_processors=132, config=config)
    problem, weight = layer_problem(40, (256,), ())
    with pytest.raises(ValueError, match="updates take up to 32 rows here, not 40"):
        matmul_hopper(
            problem.x, weight, poisoned(40, 256, dtype=torch.float16), num_processors=132, config=config,
            updates=Updates(problem.layer, problem.rows, torch.empty(0)),
        )  # fmt: skip


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def normed(total: Tensor, norm: Tensor) -> Tensor:
    return total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.double()
