"""The KV cache's tensors: their size, and copies of blocks."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.tiny_decoders import CPU, SIZES
from trident_llm.engine.kv_cache import KVCache, bytes_per_block
from trident_llm.models.model_config import ModelConfig

CONFIG = ModelConfig(**SIZES, architecture="LlamaForCausalLM", rope_theta=10000.0)
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *EIGHT_BITS], ids=str)


def new_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CONFIG, num_blocks=6, block_size=4, dtype=dtype, device=CPU)


def tensors(cache: KVCache) -> list[torch.Tensor]:
    """Of all layers, values and scales; float8 as integers, which torch compares everywhere."""
    found = [tensor for layer in cache.layers for tensor in (layer.values, layer.scales) if tensor is not None]
    return [tensor.view(torch.int8) if tensor.itemsize == 1 else tensor for tensor in found]


def test_layers_and_bytes_agree():
    cache = new_cache(torch.bfloat16)
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(6, 4, 2, 2, 16)] * 3
    assert all(layer.scales is None for layer in cache.layers)
    assert cache.num_bytes == sum(tensor.nbytes for tensor in tensors(cache))
    assert cache.num_bytes == 6 * bytes_per_block(CONFIG, block_size=4, dtype=torch.bfloat16)
    assert all(tensor.count_nonzero() == 0 for tensor in tensors(cache))


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_scales_of_8_bits_are_part_of_the_layers_and_count(dtype):
    cache = new_cache(dtype)
    assert [layer.values.dtype for layer in cache.layers] == [dtype] * 3
    assert [tuple(layer.scales.shape) for layer in cache.layers] == [(6, 4, 2, 2)] * 3
    assert cache.num_bytes == sum(tensor.nbytes for tensor in tensors(cache))
    # One byte a number, and four bytes for the 16 numbers of a head.
    assert bytes_per_block(CONFIG, block_size=4, dtype=dtype) == 3 * 4 * 2 * 2 * (16 + 4)
    assert all(tensor.count_nonzero() == 0 for tensor in tensors(cache))


@DTYPES
def test_copy_blocks_copies_in_every_layer_and_touches_nothing_else(dtype):
    cache = new_cache(dtype)
    for index, tensor in enumerate(tensors(cache)):
        tensor.copy_(10 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)))
    before = [tensor.clone() for tensor in tensors(cache)]
    cache.copy_blocks([5, 0], [2, 3])
    for old, tensor in zip(before, tensors(cache), strict=True):
        assert torch.equal(tensor[[2, 3]], old[[5, 0]])
        assert torch.equal(tensor[[0, 1, 4, 5]], old[[0, 1, 4, 5]])


@DTYPES
def test_copy_blocks_reads_before_it_writes(dtype):
    cache = new_cache(dtype)
    for tensor in tensors(cache):
        tensor.copy_(torch.arange(6.0).view(6, *[1] * (tensor.dim() - 1)).expand(tensor.shape))
    cache.copy_blocks([0, 1], [1, 2])
    assert all(tensor.flatten(1)[:, 0].tolist() == [0, 0, 1, 3, 4, 5] for tensor in tensors(cache))
