"""Decode steps replayed from a CUDA graph, on a GPU only, against the torch twin."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import assert_close, random_tensor
from trident_llm.kernels import reference
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.triton_language import TritonLanguageKernels

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64


def test_a_captured_decode_step_serves_other_contexts_and_smaller_batches() -> None:
    kernels_on_gpu = TritonLanguageKernels.for_device(torch.device(DEVICE))
    steps = PagedSteps(6, max_len=160, block_size=16, device=DEVICE)
    capacity = [Chunk(seq, 159, 1) for seq in range(6)]
    full = steps.metadata(capacity)
    plan = kernels_on_gpu.plan_attention(full, dtype=torch.bfloat16)
    cache = random_tensor(steps.num_blocks, 16, 2, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    source = random_tensor(6, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, seed=1)
    norm = random_tensor(HEADS * HEAD_DIM, dtype=torch.bfloat16, seed=2)
    weight = random_tensor(HEADS * HEAD_DIM, HEADS * HEAD_DIM, dtype=torch.bfloat16, seed=3, scale=0.05)
    cos = random_tensor(6, 1, HEAD_DIM, dtype=torch.bfloat16, seed=4)

    def step(kernels: object, step_plan: object, rows: int, pool: torch.Tensor) -> torch.Tensor:
        qkv = source[:rows].clone()
        layer = LayerCache(pool)
        kernels.rotary_embed_and_store_kv(qkv, cos[:rows], cos[:rows], layer, step_plan)
        attended = kernels.paged_attention(qkv[:, :HEADS], layer, step_plan, HEAD_DIM**-0.5)
        return kernels.rms_norm(kernels.linear(attended, weight), norm, 1e-5)

    warm = cache.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(kernels_on_gpu, plan, 6, warm)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(kernels_on_gpu, plan, 6, cache)
    for contexts in ((159, 0, 63, 64, 100, 15), (5, 17, 140)):
        chunks = [Chunk(seq, start, 1) for seq, start in enumerate(contexts)]
        metadata = steps.metadata(chunks)
        rows = len(contexts)
        full.context_lens.zero_()
        full.context_lens[:rows] = metadata.context_lens
        full.slot_mapping.fill_(-1)
        full.slot_mapping[:rows] = metadata.slot_mapping
        expected_cache = cache.clone()
        twin_plan = reference.plan_attention(metadata, dtype=torch.bfloat16)
        expected = step(reference, twin_plan, rows, expected_cache)
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out[:rows], expected, max_error=2e-2)
        assert_close(cache, expected_cache)
