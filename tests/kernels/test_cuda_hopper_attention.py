"""Prefill attention by warps of different duties against the torch twin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product

import pytest
import torch

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import (
    DEVICE,
    HALF_DTYPES,
    INTERPRETED,
    PDL,
    RUNS_HOPPER_KERNELS,
    assert_close,
    poisoned,
    random_tensor,
)
from trident_llm.kernels import reference
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.prefill_attention_hopper import HopperConfig, prefill_attention_hopper, takes

_HEAD_DIM = 128
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS_HOPPER_KERNELS, reason="kernels of Hopper")]

MIXED = [Chunk(0, 0, 150), Chunk(1, 30, 33), Chunk(2, 0, 2), Chunk(3, 97, 2), Chunk(5, 128, 128)]
"""Whole prompts and later chunks; contexts that end within a block, with one, and with a tile of keys."""
MIXED.append(Chunk(4, 260, 70) if INTERPRETED else Chunk(4, 700, 500))


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int] = (8, 2)
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


CASES = [
    *(Case(dtype=dtype) for dtype in HALF_DTYPES),
    Case(heads=(2, 2)),
    Case(heads=(8, 1), block_size=32),
    Case(heads=(9, 3)),
    Case(heads=(6, 1), block_size=8),
    Case(heads=(8, 2), block_size=64),
]
CONFIGS = [
    None,
    HopperConfig(128, 2, persistent=False),
    HopperConfig(64, 2, persistent=False),
    HopperConfig(128, 1, persistent=True),
]
PROCESSORS = (3,) if INTERPRETED else (132, 3)
"""With few programs each has several tiles."""


class PagedCase:
    """Queries for chunks, and a cache in which NaN is wherever no chunk's context lies."""

    def __init__(self, case: Case, chunks: list[Chunk]) -> None:
        num_heads, num_kv_heads = case.heads
        longest = max(chunk.start + chunk.num_tokens for chunk in chunks)
        self.steps = PagedSteps(len(chunks), max_len=longest, block_size=case.block_size, device=DEVICE)
        self.metadata = self.steps.metadata(chunks)
        self.num_tokens = sum(chunk.num_tokens for chunk in chunks)
        self.counts = torch.tensor([0, len(chunks)], dtype=torch.int32, device=DEVICE)
        # A view with gaps, as the model's is.
        qkv = random_tensor(self.num_tokens, num_heads + 2 * num_kv_heads, _HEAD_DIM, dtype=case.dtype, seed=1)
        self.q = qkv[:, :num_heads]
        self.scale = 1.5 * _HEAD_DIM**-0.5
        shape = (self.steps.num_blocks, case.block_size, 2, num_kv_heads, _HEAD_DIM)
        values = random_tensor(*shape, dtype=case.dtype)
        # On the CPU: torch's attention in float32 on a GPU wants masks that are aligned.
        steps = PagedSteps(len(chunks), max_len=longest, block_size=case.block_size)
        plan = reference.plan_attention(steps.metadata(chunks), dtype=torch.float32)
        attended = reference.paged_attention(self.q.float().cpu(), LayerCache(values.float().cpu()), plan, self.scale)
        self.expected = attended.view(self.q.shape).to(DEVICE)
        own = [slot for chunk in chunks for slot in self.steps.slots(chunk.seq, 0, chunk.start + chunk.num_tokens)]
        slots = torch.full_like(values, float("nan")).flatten(0, 1)
        slots[own] = values.flatten(0, 1)[own]
        self.cache = LayerCache(slots.view(values.shape))

    def attend(self, out: torch.Tensor, *, num_processors: int = 132, config: HopperConfig | None = None) -> None:
        step = self.metadata
        prefill_attention_hopper(
            self.q, self.cache, step.block_tables, step.cu_seqlens_q, step.context_lens, self.counts, out,
            max_tokens=self.num_tokens, max_seqs=len(step.context_lens), scale=self.scale,
            num_processors=num_processors, config=config, pdl=PDL,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "config"), [*(zip(CASES, cycle(CONFIGS)) if INTERPRETED else product(CASES, CONFIGS))], ids=str
)
def test_several_sequences(case: Case, config: HopperConfig | None) -> None:
    paged = PagedCase(case, MIXED)
    assert takes(paged.q, paged.cache, None, None)
    for num_processors in PROCESSORS:
        out = poisoned(*paged.q.shape, dtype=case.dtype)
        paged.attend(out, num_processors=num_processors, config=config)
        assert_close(out, paged.expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 127, 128, 129, *([] if INTERPRETED else [500, 2048])])
def test_one_prompt(num_tokens: int) -> None:
    paged = PagedCase(Case(heads=(16, 4)), [Chunk(0, 0, num_tokens)])
    out = poisoned(*paged.q.shape, dtype=paged.q.dtype)
    for _ in range(1 if INTERPRETED else 5):
        paged.attend(out)
        assert_close(out, paged.expected)


def test_sequences_with_one_token_and_rows_that_pad_a_step_are_left_alone() -> None:
    decodes = [Chunk(0, 159, 1), Chunk(1, 20, 1)]
    prefills = [Chunk(2, 0, 150), Chunk(3, 30, 33)]
    paged = PagedCase(Case(), [*decodes, *prefills])
    step = paged.metadata
    q = torch.cat([paged.q, poisoned(77, *paged.q.shape[1:], dtype=paged.q.dtype)])
    out = poisoned(*q.shape, dtype=q.dtype)
    tables = torch.cat([step.block_tables, step.block_tables[:1]])
    starts = torch.cat([step.cu_seqlens_q, step.cu_seqlens_q[-1:]])
    contexts = torch.cat([step.context_lens, step.context_lens.new_zeros(1)])
    counts = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)
    prefill_attention_hopper(
        q, paged.cache, tables, starts, contexts, counts, out, max_tokens=len(q), max_seqs=5, scale=paged.scale,
        num_processors=132, pdl=PDL,
    )  # fmt: skip
    assert out[:2].isnan().all()
    assert_close(out[2 : paged.num_tokens], paged.expected[2:])
    assert out[paged.num_tokens :].isnan().all()


def test_a_step_without_prompts_writes_nothing() -> None:
    paged = PagedCase(Case(), [Chunk(0, 159, 1), Chunk(1, 20, 1)])
    out = poisoned(*paged.q.shape, dtype=paged.q.dtype)
    counts = torch.tensor([2, 2], dtype=torch.int32, device=DEVICE)
    step = paged.metadata
    prefill_attention_hopper(
        paged.q, paged.cache, step.block_tables, step.cu_seqlens_q, step.context_lens, counts, out, max_tokens=64,
        max_seqs=3, scale=paged.scale, num_processors=132, pdl=PDL,
    )  # fmt: skip
    assert out.isnan().all()
