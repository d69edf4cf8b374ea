"""The operands on which kernels that bring rows to 8 bits are timed: sizes of Mistral-7B, fresh random values.

Each is timed in one pass ("together") and as the two kernels whose bits it must give ("apart").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_problems import COLD_BYTES, Launch, random_tensor, relative_error, release
from torch import Tensor

from trident_llm.kernels.quantize_rows import quantize_rows
from trident_llm.kernels.quantized_rows import QuantizedRows, allocate_rows
from trident_llm.kernels.rms_norm import rms_norm
from trident_llm.kernels.silu_and_mul import silu_and_mul
from trident_llm.kernels.silu_and_quantize import silu_and_quantize

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class _RowProblem:
    rows: int
    kind: str
    """int8 | fp8."""
    size: int
    """Of a row that comes to 8 bits."""
    bytes_per_number: int
    """Moved by one pass."""
    flops = 0.0

    def _copies(self, device: str) -> int:
        self.codes = CODES[self.kind]
        self.num_bytes = self.rows * self.size * self.bytes_per_number
        return 1 if device == "cpu" else max(4, min(64, int(COLD_BYTES / self.num_bytes)))

    def expected(self) -> QuantizedRows:
        """What the last launch should have given."""
        raise NotImplementedError

    def error(self) -> float:
        """Relative error of the last launch's rows; other warps may change a sum's last bit, and with it some codes."""
        return relative_error(_values(self.out), _values(self.expected()))

    def poison(self) -> None:
        self.out.scales.fill_(float("nan"))

    def release(self) -> None:
        self.out = None
        release(self)


@dataclass
class NormRows(_RowProblem):
    """RMSNorm of x [rows, 4096] added to a residual."""

    rows: int
    kind: str
    size = 4096
    bytes_per_number = 2 + 2 * 2 + 1

    def prepare(self, device: str) -> None:
        copies = self._copies(device)
        self.weight = random_tensor(device, self.size)
        self.x = [random_tensor(device, self.rows, self.size) for _ in range(copies)]
        self.residuals = [random_tensor(device, self.rows, self.size) for _ in range(copies)]

    def launches(self, form: str, config: Any, pdl: bool = True) -> list[Launch]:
        x = self.x[0]
        self.out = allocate_rows(*x.shape, self.codes, dtype=x.dtype, device=x.device)

        def launch(x: Tensor, residual: Tensor) -> None:
            out = self.out if form == "together" else torch.empty_like(x)
            rms_norm(x, self.weight, 1e-5, out, residual=residual, config=config, pdl=pdl)
            if form == "apart":
                self.out = quantize_rows(out, self.codes, pdl=pdl)

        return [lambda x=x, r=r: launch(x, r) for x, r in zip(self.x, self.residuals, strict=True)]

    def expected(self) -> QuantizedRows:
        # The residual has been added to, so its norm is what came out.
        normed = torch.empty_like(self.x[-1])
        rms_norm(self.residuals[-1], self.weight, 1e-5, normed)
        return quantize_rows(normed, self.codes)


@dataclass
class SiluRows(_RowProblem):
    """silu(gate) * up of [rows, 2 * 14336]."""

    rows: int
    kind: str
    size = 14336
    bytes_per_number = 2 * 2 + 1

    def prepare(self, device: str) -> None:
        self.gate_up = [random_tensor(device, self.rows, 2 * self.size) for _ in range(self._copies(device))]

    def launches(self, form: str, config: Any, pdl: bool = True) -> list[Launch]:
        gate_up = self.gate_up[0]
        self.out = allocate_rows(self.rows, self.size, self.codes, dtype=gate_up.dtype, device=gate_up.device)

        def launch(gate_up: Tensor) -> None:
            if form == "together":
                self.out = silu_and_quantize(gate_up, self.codes, config=config, pdl=pdl)
            else:
                self.out = self._apart(gate_up, pdl)

        return [lambda g=g: launch(g) for g in self.gate_up]

    def _apart(self, gate_up: Tensor, pdl: bool) -> QuantizedRows:
        out = gate_up.new_empty(self.rows, self.size)
        silu_and_mul(gate_up, out, pdl=pdl)
        return quantize_rows(out, self.codes, pdl=pdl)

    def expected(self) -> QuantizedRows:
        return self._apart(self.gate_up[-1], pdl=False)


def _values(rows: QuantizedRows) -> Tensor:
    return rows.values.float() * rows.scales[:, None]
