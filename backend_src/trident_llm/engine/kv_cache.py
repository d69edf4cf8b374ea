"""KVCache: the tensors of the paged KV cache. Which block belongs to whom is the block manager's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.model_config import ModelConfig


def bytes_per_block(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V of ``block_size`` tokens in all layers."""
    values_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return values_per_token * block_size * dtype.itemsize


class KVCache:
    """One pool of ``num_blocks`` blocks per layer, all of them in one allocation.

    A layer's pool is [num_blocks, block_size, 2, num_kv_heads, head_dim]. K and V of a token lie side by side, as they
    do in the output of the merged q/k/v projection: a step writes a token's K and V in one copy and gathers a block's
    in one, where two separate pools take two each (CPU, one token: 2.4 against 4.5 us to write).

    The pool starts as zeros: attention gives masked slots the weight 0, and 0 times a stray NaN would be NaN.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_bytes = num_blocks * bytes_per_block(config, block_size=block_size, dtype=dtype)
        shape = (
            config.num_hidden_layers, num_blocks, block_size, 2, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self.layers: tuple[Tensor, ...] = tuple(self._pool.unbind(0))

    def copy_blocks(self, src_ids: Sequence[int], dst_ids: Sequence[int]) -> None:
        """Copy block ``src_ids[i]`` to ``dst_ids[i]`` in every layer; all are read before any is written."""
        device = self._pool.device
        source = self._pool.index_select(1, torch.tensor(src_ids, device=device))
        self._pool.index_copy_(1, torch.tensor(dst_ids, device=device), source)
