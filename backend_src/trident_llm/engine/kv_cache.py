"""KVCache: the tensors of the paged KV cache. Which block belongs to whom is the block manager's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.layer_cache import SCALED_LIMITS, LayerCache
from ..models.model_config import ModelConfig
from .to_device import send


def bytes_per_block(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of ``block_size`` tokens in all layers, and of their scales where ``dtype`` has 8 bits."""
    num_heads = 2 * config.num_hidden_layers * config.num_key_value_heads * block_size
    scale_bytes = torch.float32.itemsize if dtype in SCALED_LIMITS else 0
    return num_heads * (config.head_dim * dtype.itemsize + scale_bytes)


class KVCache:
    """One pool of ``num_blocks`` blocks per layer, all of them in one allocation.

    A layer's pool is [num_blocks, block_size, 2, num_kv_heads, head_dim]. K and V of a token lie side by side, as they
    do in the output of the merged q/k/v projection: a step writes a token's K and V in one copy and gathers a block's
    in one, where two separate pools take two each (CPU, one token: 2.4 against 4.5 us to write).

    With 8 bits the scales lie in an allocation of their own, [num_blocks, block_size, 2, num_kv_heads] a layer.

    The pool starts as zeros: attention gives masked slots the weight 0, and 0 times a stray NaN would be NaN.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = bytes_per_block(config, block_size=block_size, dtype=dtype)
        self.num_bytes = num_blocks * self.block_bytes
        shape = (
            config.num_hidden_layers, num_blocks, block_size, 2, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        values = torch.zeros(shape, dtype=dtype, device=device)
        if dtype in SCALED_LIMITS:
            scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
            self.layers = tuple(map(LayerCache, values, scales))
            # As integers: not every operator of torch takes float8.
            self.pools: tuple[Tensor, ...] = values.view(torch.int8), scales
        else:
            self.layers = tuple(map(LayerCache, values))
            self.pools = (values,)
        """All that a block is, for those who copy blocks: each [layers, num_blocks, ...]."""

    def copy_blocks(self, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
        """Copy block ``src_ids[i]`` to ``dst_ids[i]`` in every layer; all are read before any is written."""
        device = self.pools[0].device
        sources, destinations = (send(ids, torch.int64, device) for ids in (src_ids, dst_ids))
        for pool in self.pools:
            pool.index_copy_(1, destinations, pool.index_select(1, sources))
