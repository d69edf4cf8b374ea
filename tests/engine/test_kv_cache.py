"""The KV cache's tensors: their size, and copies of blocks."""

from __future__ import annotations

import torch

from tests.fakes.tiny_decoders import CPU, SIZES
from trident_llm.engine.kv_cache import KVCache, bytes_per_block
from trident_llm.models.model_config import ModelConfig

CONFIG = ModelConfig(**SIZES, architecture="LlamaForCausalLM", rope_theta=10000.0)


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, num_blocks=6, block_size=4, dtype=dtype, device=CPU)


def test_layers_and_bytes_agree():
    cache = new_cache(torch.bfloat16)
    assert [tuple(layer.shape) for layer in cache.layers] == [(6, 4, 2, 2, 16)] * 3
    assert cache.num_bytes == sum(layer.nbytes for layer in cache.layers)
    assert cache.num_bytes == 6 * bytes_per_block(CONFIG, block_size=4, dtype=torch.bfloat16)
    assert all(layer.count_nonzero() == 0 for layer in cache.layers)


def test_copy_blocks_copies_in_every_layer_and_touches_nothing_else():
    cache = new_cache()
    for index, layer in enumerate(cache.layers):
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(index)))
    before = [layer.clone() for layer in cache.layers]
    cache.copy_blocks([5, 0], [2, 3])
    for old, layer in zip(before, cache.layers, strict=True):
        assert torch.equal(layer[[2, 3]], old[[5, 0]])
        assert torch.equal(layer[[0, 1, 4, 5]], old[[0, 1, 4, 5]])


def test_copy_blocks_reads_before_it_writes():
    cache = new_cache()
    for layer in cache.layers:
        layer.copy_(torch.arange(6.0).view(6, 1, 1, 1, 1).expand(layer.shape))
    cache.copy_blocks([0, 1], [1, 2])
    assert cache.layers[2][:, 0, 0, 0, 0].tolist() == [0, 0, 1, 3, 4, 5]
