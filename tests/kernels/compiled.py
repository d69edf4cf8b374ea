"""Operands of kernels that are only compiled, and what their machine code says, by the tools that come with the Triton
language."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
import triton.backends.nvidia

from tests.fakes.fake_hopper import FakeHopperDriver
from trident_llm.kernels.quantized_weight import Activations, QuantizedWeight

CPU = torch.device("cpu")


def machine_code(hopper: FakeHopperDriver, name: str, folder: Path) -> str:
    """A kernel's instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(hopper.machine_code[name])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def stack_bytes(hopper: FakeHopperDriver, name: str, folder: Path) -> int:
    """Local memory of a thread of a kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(hopper.machine_code[name])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack, local = (re.search(f" {kind}:(\\d+) ", usage) for kind in ("STACK", "LOCAL"))
    assert stack is not None and local is not None
    return int(stack[1]) + int(local[1])


def assert_no_stack(hopper: FakeHopperDriver, name: str, folder: Path) -> None:
    assert stack_bytes(hopper, name, folder) == 0


def empty_weight(
    num_outputs: int, num_inputs: int, bits: int, activations: Activations = "none"
) -> QuantizedWeight:
    group_size = 128 if activations == "none" else num_inputs
    codes = torch.empty(num_outputs, num_inputs, dtype=torch.float8_e4m3fn if activations == "fp8" else torch.uint8)
    scales = torch.empty(num_outputs, num_inputs // group_size)
    zero_points = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zero_points, bits, group_size, activations)
