"""What calibration learns about the input of a linear layer, gathered chunk by chunk in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_ROWS = 512
"""Inputs kept as they are, evenly spread over the calibration text."""


@dataclass(frozen=True)
class InputStatistics:
    """Of the rows x [in] that a linear layer read, in float32 on the weight's device."""

    mean_abs: Tensor
    """[in]: mean of abs(x)."""
    max_abs: Tensor
    """[in]: largest abs(x)."""
    sample: Tensor
    """[S, in]: some rows."""
    hessian: Tensor | None = None
    """[in, in]: mean of x x^T; None where it was not asked for."""

    def divided_by(self, scales: Tensor) -> InputStatistics:
        """The statistics of x / scales, scales [in]."""
        return InputStatistics(
            mean_abs=self.mean_abs / scales,
            max_abs=self.max_abs / scales,
            sample=self.sample / scales,
            hessian=None if self.hessian is None else self.hessian / scales / scales[:, None],
        )

    def output_error(self, difference: Tensor) -> Tensor:
        """Mean of the squared error that ``difference`` [out, in] in the weight makes in the output, summed over out;
        a scalar on the device. Needs the Hessian."""
        assert self.hessian is not None
        return (difference @ self.hessian).mul_(difference).sum()


class Gatherer:
    """Takes the inputs of one linear layer as they come."""

    def __init__(self, num_inputs: int, num_rows: int, device: torch.device, *, hessian: bool) -> None:
        """num_rows: of all inputs that will come together."""
        self._every = max(num_rows // SAMPLE_ROWS, 1)
        self._num_rows = 0
        self._sum_abs = torch.zeros(num_inputs, device=device)
        self._max_abs = torch.zeros(num_inputs, device=device)
        self._samples: list[Tensor] = []
        self._hessian = torch.zeros(num_inputs, num_inputs, device=device) if hessian else None

    def add(self, x: Tensor) -> None:
        """x: [..., in], any float dtype."""
        rows = x.reshape(-1, x.shape[-1])
        self._samples.append(rows[-self._num_rows % self._every :: self._every].float())
        self._num_rows += rows.shape[0]
        magnitudes = rows.abs()
        self._sum_abs += magnitudes.sum(0, dtype=torch.float32)
        self._max_abs = torch.maximum(self._max_abs, magnitudes.amax(0).float())
        if self._hessian is not None:
            rows = rows.float()
            self._hessian.addmm_(rows.T, rows)

    def result(self) -> InputStatistics:
        return InputStatistics(
            mean_abs=self._sum_abs / self._num_rows,
            max_abs=self._max_abs,
            sample=torch.cat(self._samples),
            hessian=None if self._hessian is None else self._hessian / self._num_rows,
        )
