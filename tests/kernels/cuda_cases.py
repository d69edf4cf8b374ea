"""Where the tests of Triton-language kernels run: on the GPU, or on the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PDL = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
"""The interpreter knows no programmatic dependent launch."""
RUNS_HOPPER_KERNELS = INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9)
"""Those of Hopper alone; where kernels are interpreted, these are emulated (``tests.fakes.gluon``)."""
HOPPER_PROCESSORS = [132] if INTERPRETED else [0, 132] if RUNS_HOPPER_KERNELS else [0]
"""For linear layers, which choose kernels of Hopper or of all; the latter's products take the interpreter seconds."""
HALF_DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
"""The interpreter multiplies bf16 matrices wrongly."""
DTYPES = [torch.float32, *HALF_DTYPES]

MAX_ERRORS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output tensor in which an element that is never written shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, max_error: float | None = None) -> None:
    """Relative error of the whole tensor, against a float32 or float64 reference, within the dtype's rounding."""
    limit = MAX_ERRORS[actual.dtype] if max_error is None else max_error
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= limit, f"relative error {error:.2e}, allowed {limit:.2e}"
