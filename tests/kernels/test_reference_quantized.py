"""Products with quantized weights on the CPU, against float32 products with what the weights stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trident_llm.kernels import reference
from trident_llm.kernels.quantized_weight import Activations, QuantizedWeight
from trident_llm.kernels.reference_quantized import quantize_tokens

SHAPES = [(320, 576), (128, 1536), (1040, 96), (50, 96), (7, 48)]
"""Whole panels, panels with a rest, and widths for which torch has no operator."""
ROWS = [0, 1, 3, 33, 70]
"""On both sides of where operators give way to dequantization."""
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
"""Norm of the error over the norm of the product. bfloat16 rounds x, scales and products to 8 bits."""


def make_weight(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    activations: Activations = "none",
    order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits * 1000 + group_size)
    groups = (shape[0], shape[1] // group_size)
    middle = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    any_zero = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8),
        scales=(0.01 + 0.01 * torch.rand(groups, generator=generator)).to(scale_dtype),
        zero_points=middle if symmetric else any_zero,
        bits=bits,
        group_size=group_size,
        activations=activations,
        input_order=torch.randperm(shape[1], generator=generator) if order else None,
    )


def check(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    packed = reference.pack_linear(weight)
    bias = torch.linspace(-1, 1, weight.shape[0]).to(dtype)
    for num_rows in ROWS:
        x = torch.randn(num_rows, weight.shape[1], generator=torch.Generator().manual_seed(num_rows)).to(dtype)
        y = reference.linear(x, packed, bias)
        read = x.float()
        if weight.activations != "none" and num_rows:
            codes, scales = quantize_tokens(x, weight.activations)
            read = codes * scales
        expected = read @ weight.dequantize().t() + bias.float()
        assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
        assert (y.float() - expected).norm() <= TOLERANCES[dtype] * expected.norm(), (num_rows, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_weight_only(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    sizes = [size for size in (16, 32, 64, 128, shape[1]) if shape[1] % size == 0]
    for index, group_size in enumerate(sizes):
        check(make_weight(shape, bits, group_size, symmetric=index % 2 == 1), dtype)
    check(make_weight(shape, bits, shape[1], symmetric=True), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_input_order(dtype: torch.dtype) -> None:
    check(make_weight((960, 576), 4, 64, order=True), dtype)
    check(make_weight((960, 576), 8, 576, symmetric=True, order=True), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(make_weight(shape, 8, shape[1], symmetric=True, activations="int8"), dtype)
    check(make_weight(shape, 8, shape[1], activations="int8"), dtype)
    check(make_weight(shape, 4, 16, activations="int8"), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_fp8(dtype: torch.dtype) -> None:
    for shape, group_size in (((960, 576), 576), ((50, 96), 32)):
        scales = torch.rand(shape[0], shape[1] // group_size) * 1e-3 + 1e-4
        codes = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        zero_points = torch.zeros(scales.shape, dtype=torch.uint8)
        check(QuantizedWeight(codes, scales, zero_points, 8, group_size, "fp8"), dtype)


def test_extreme_scales_keep_their_value() -> None:
    """Scales that float16 cannot hold, or whose 16fold it cannot."""
    for dtype, factor in ((torch.float32, 1e-6), (torch.float16, 1e5)):
        weight = make_weight((64, 64), 8, 32, scale_dtype=torch.float32)
        scales = (weight.scales * factor).to(dtype)
        check(QuantizedWeight(weight.codes, scales, weight.zero_points, 8, 32), torch.float32)
        check(QuantizedWeight(weight.codes, scales, weight.zero_points, 8, 32), torch.bfloat16)


def test_tokens_are_quantized_to_the_limit() -> None:
    x = torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0], [1e30, 0.0, -1e30]])
    codes, scales = quantize_tokens(x, "int8")
    assert codes.tolist() == [[32.0, -127.0, 16.0], [0.0] * 3, [127.0, 0.0, -127.0]]
    assert torch.allclose(scales[0], torch.tensor([4 / 127]))
    codes, scales = quantize_tokens(x, "fp8")
    assert codes.abs().amax(1).tolist() == [448.0, 0.0, 448.0]


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(4, 64, 4.5), (5, 64, 9.0), (8, 64, 9.0), (8, 576, 8.06)])
def test_bytes(bits: int, group_size: int, expected: float) -> None:
    """Bits per weight, scales and zero points included, before and after the first product."""
    packed = reference.pack_linear(make_weight((960, 576), bits, group_size, symmetric=True))
    before = packed.nbytes
    reference.linear(torch.zeros(1, 576, dtype=torch.bfloat16), packed)
    assert packed.nbytes == before == pytest.approx(960 * 576 * expected / 8, rel=0.01)


def test_with_the_instructions_of_older_machines() -> None:
    """AVX2's operator has another layout, and without AVX2 there is none that is known."""
    program = "import tests.kernels.test_reference_quantized as t, torch; "
    program += "[t.check(t.make_weight((1040, 96), b, 32), d) for b in (4, 8) for d in t.TOLERANCES]"
    root = Path(__file__).parents[2]
    for capability in ("avx2", "default"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{root / 'backend_src'}:{root}"}
        subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, check=True, timeout=100)
