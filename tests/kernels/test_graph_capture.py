"""Decode steps replayed from a CUDA graph, on a GPU only, against the torch twin."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.lora_problems import make_problem, mixed_weights
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import RUNS_HOPPER_KERNELS, assert_close, poisoned, random_tensor
from tests.kernels.test_cuda_hopper_attention import Case, PagedCase
from trident_llm.kernels import reference
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.lora import add_lora
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


def test_products_that_updates_join_read_what_the_kernel_before_the_last_wrote() -> None:
    """They begin beside the kernel that makes the updates' first half: rows of an earlier replay would show."""
    size, layers = 4096, []
    problem = make_problem(
        mixed_weights(64, 4), ranks=(16, 8, 0, 24), part_sizes=(size,), num_inputs=size, dtype=torch.bfloat16,
        device=DEVICE,
    )  # fmt: skip
    problem.layer.a.mul_(0.05)
    problem.layer.b.mul_(0.05)
    kernels_on_gpu = TritonLanguageKernels.for_device(torch.device(DEVICE))
    for index in range(6):
        layers.append(random_tensor(size, size, dtype=torch.bfloat16, seed=index, scale=size**-0.5))
    norm = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    x = problem.x.clone()

    def chain(joined: bool) -> torch.Tensor:
        residual = x.clone()
        hidden = kernels_on_gpu.rms_norm(residual, norm, 1e-5)
        for weight in layers:
            operands = (hidden, weight, None, residual, norm, 1e-5)
            if joined:
                hidden = kernels_on_gpu.linear_lora_add_rms_norm(*operands, problem.layer, problem.rows)
            else:
                product = kernels_on_gpu.linear(hidden, weight)
                add_lora(product, hidden, None, problem.layer, problem.rows)
                hidden = kernels_on_gpu.fused_add_rms_norm(product, residual, norm, 1e-5)
        return hidden

    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for seed in range(20):
        x.copy_(random_tensor(64, size, dtype=torch.bfloat16, seed=100 + seed))
        graph.replay()
        assert_close(out, chain(False), 0.03)


@pytest.mark.skipif(not RUNS_HOPPER_KERNELS, reason="kernels of Hopper")
def test_a_captured_attention_of_prompts_serves_other_lengths() -> None:
    capacity = PagedCase(Case(), [Chunk(0, 700, 500), Chunk(1, 0, 300)])
    out = poisoned(*capacity.q.shape, dtype=capacity.q.dtype)
    capacity.attend(out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capacity.attend(out)
    other = PagedCase(Case(), [Chunk(0, 333, 61), Chunk(1, 0, 129)])
    step, values = capacity.metadata, capacity.cache.values
    step.block_tables.zero_()[:, : other.metadata.block_tables.shape[1]] = other.metadata.block_tables
    step.cu_seqlens_q.copy_(other.metadata.cu_seqlens_q)
    step.context_lens.copy_(other.metadata.context_lens)
    values[: len(other.cache.values)] = other.cache.values
    capacity.q[: other.num_tokens] = other.q
    out.fill_(float("nan"))
    graph.replay()
    assert_close(out[: other.num_tokens], other.expected)
    assert out[other.num_tokens :].isnan().all()
