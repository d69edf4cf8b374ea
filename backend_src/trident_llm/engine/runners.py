"""Which runner computes a model's steps, by its device, and the host tier that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..config import EngineConfig
from .host_tier import HostTier, TransferCosts
from .loading import LoadedModel
from .model_runner import ModelRunner

if TYPE_CHECKING:
    from .cuda_runner import CudaRunner


def runs_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def make_runner(model: LoadedModel, config: EngineConfig, progress: Callable[[str], None]) -> ModelRunner | CudaRunner:
    """``progress`` is told of graphs that are captured."""
    if not runs_on_gpu(model.device):
        return ModelRunner(
            model.decoder, model.kv_cache, device=model.device, num_adapter_slots=config.num_adapter_slots
        )
    from .cuda_runner import CudaRunner

    return CudaRunner(
        model.decoder,
        model.kv_cache,
        device=model.device,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        num_host_blocks=model.num_host_blocks,
        num_adapter_slots=config.num_adapter_slots,
        # Steps with a mix that is loaded later run without graphs.
        captures_mixes=bool(config.xlora) and config.routing_method == "learned",
        progress=progress,
    )


def make_host_tier(model: LoadedModel, config: EngineConfig, costs: TransferCosts | None) -> HostTier | None:
    """``costs``: of the runner's transfers; None where there are none."""
    return None if costs is None else HostTier(model.num_host_blocks, config.block_size, costs)
