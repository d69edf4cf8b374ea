"""The methods behind one interface: what each needs to know of a layer's input, its scales, its quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.quantized_weight import QuantizedWeight
from . import awq, fp8, gptq, rtn, smoothquant
from .scheme import LinearScheme
from .statistics import InputStatistics

_CALIBRATED = ("awq", "gptq", "smoothquant")
_WITH_HESSIAN = ("awq", "gptq")
_SCALED = ("awq", "smoothquant")


def needs_calibration(scheme: LinearScheme | None) -> bool:
    return scheme is not None and scheme.method in _CALIBRATED


def needs_hessian(scheme: LinearScheme | None) -> bool:
    return scheme is not None and scheme.method in _WITH_HESSIAN


def scales_inputs(scheme: LinearScheme | None) -> bool:
    """Whether ``search_scales`` has something to find."""
    return scheme is not None and scheme.method in _SCALED


def search_scales(scheme: LinearScheme, weight: Tensor, statistics: InputStatistics) -> Tensor:
    """What to multiply the columns of weight [out, in] by before it is quantized: [in] float32."""
    if scheme.method == "smoothquant":
        return smoothquant.search_scales(weight, statistics)
    return awq.search_scales(
        weight, statistics, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric
    )


def quantize(scheme: LinearScheme, weight: Tensor, statistics: InputStatistics | None) -> QuantizedWeight:
    """weight [out, in], scaled if the method scales; statistics of what it then reads, if the method needs them."""
    if scheme.method == "smoothquant":
        return smoothquant.quantize(weight)
    if scheme.method == "fp8":
        return fp8.quantize(weight)
    if scheme.method == "rtn":
        return rtn.quantize(weight, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)
    assert statistics is not None
    method = awq.quantize if scheme.method == "awq" else gptq.quantize
    return method(weight, statistics, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)


def rounded_input(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """x as the kernels round it for this weight."""
    if weight.activations == "int8":
        return smoothquant.to_int8_rows(x.float()).to(x.dtype)
    if weight.activations == "fp8":
        return fp8.to_fp8_rows(x).to(x.dtype)
    return x


def relative_error(weight: Tensor, result: QuantizedWeight, statistics: InputStatistics | None) -> float:
    """Root of squared error over squared size: of the sampled inputs' outputs, or of the weight without statistics."""
    weight, dequantized = weight.float(), result.dequantize()
    if statistics is None:
        error, size = (dequantized - weight).square().sum(), weight.square().sum()
    else:
        expected = statistics.sample @ weight.T
        error = (rounded_input(result, statistics.sample) @ dequantized.T).sub_(expected).square_().sum()
        size = expected.square_().sum()
    return float(torch.sqrt(error / size.clamp(min=torch.finfo(torch.float32).tiny)).item())
