"""Linear layers for few rows in the Triton language against float64 torch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda_cases import HALF_DTYPES, INTERPRETED, PDL, assert_close, poisoned, random_tensor
from trident_llm.kernels.matrix_vector import MatrixVectorConfig, matrix_vector
from trident_llm.kernels.skinny_matmul import SkinnyConfig, skinny_matmul

pytestmark = pytest.mark.gpu

SIZES = [(22, 576), (13, 1000)] if INTERPRETED else [(6144, 4096), (4096, 14336), (33, 1000), (1536, 576)]


def operands(num_rows: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight and bias."""
    num_outputs, num_inputs = size
    x = random_tensor(num_rows, num_inputs, dtype=dtype)
    weight = random_tensor(num_outputs, num_inputs, dtype=dtype, seed=1, scale=0.02)
    return x, weight, random_tensor(num_outputs, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_matrix_vector(num_rows: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(num_rows, size, dtype)
    expected = x.double() @ weight.double().T
    out = poisoned(num_rows, size[0], dtype=dtype)
    matrix_vector(x, weight, out, pdl=PDL)
    assert_close(out, expected)
    matrix_vector(x, weight, out, bias=bias, pdl=PDL)
    assert_close(out, expected + bias.double())


def test_matrix_vector_in_several_loads() -> None:
    x, weight, _ = operands(2, (37, 900), torch.float16)
    out = poisoned(2, 37, dtype=torch.float16)
    matrix_vector(x, weight, out, config=MatrixVectorConfig(4, 256, 4), pdl=PDL)
    assert_close(out, x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_matrix_vector_with_silu_equals_two_steps(num_rows: int, dtype: torch.dtype) -> None:
    x, weight, _ = operands(num_rows, (130, 512), dtype)
    gate, up = (x.double() @ weight.double().T).to(dtype).double().chunk(2, -1)
    out = poisoned(num_rows, 65, dtype=dtype)
    matrix_vector(x, weight, out, silu_and_mul=True, pdl=PDL)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 33, 64])
def test_skinny_matmul(num_rows: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(num_rows, size, dtype)
    expected = x.double() @ weight.double().T
    out = poisoned(num_rows, size[0], dtype=dtype)
    skinny_matmul(x, weight, out, pdl=PDL)
    assert_close(out, expected)
    skinny_matmul(x, weight, out, bias=bias, config=SkinnyConfig(64, 64, 4, 3, 256), pdl=PDL)
    assert_close(out, expected + bias.double())


def test_rows_may_lie_in_a_wider_tensor() -> None:
    x, weight, _ = operands(2, (40, 576), torch.float16)
    wide = torch.zeros(2, 1000, dtype=torch.float16, device=x.device)
    wide[:, :576] = x
    for function in (matrix_vector, skinny_matmul):
        out = poisoned(2, 40, dtype=torch.float16)
        function(wide[:, :576], weight, out, pdl=PDL)
        assert_close(out, x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("num_inputs", "num_splits"), [(576, 2), (1000, 3), (1024, 4)])
def test_parts_of_a_split_skinny_matmul_add_up(num_inputs: int, num_splits: int, dtype: torch.dtype) -> None:
    x, weight, _ = operands(9, (37, num_inputs), dtype)
    out = poisoned(num_splits, 9, 37, dtype=torch.float32)
    skinny_matmul(x, weight, out, config=SkinnyConfig(32, 64, 4, 3, 0, num_splits), pdl=PDL)
    assert_close(out.sum(0), x.double() @ weight.double().T, max_error=1e-5)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("num_rows", [5, 17])
def test_skinny_matmul_with_silu_equals_two_steps(num_rows: int, dtype: torch.dtype) -> None:
    x, weight, _ = operands(num_rows, (130, 512), dtype)
    gate, up = (x.double() @ weight.double().T).to(dtype).double().chunk(2, -1)
    out = poisoned(num_rows, 65, dtype=dtype)
    skinny_matmul(x, weight, out, silu_and_mul=True, config=SkinnyConfig(32, 64, 4, 3, 0), pdl=PDL)
    assert_close(out, torch.nn.functional.silu(gate) * up)
