"""Small host values on their way to a device, and back. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def send(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``. Goes through pinned memory: a copy from pageable memory would make the host
    wait for the work that the GPU has in its queue."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; complete once the work that the device has in its queue is."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
