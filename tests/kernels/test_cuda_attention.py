"""Paged attention in the Triton language against softmax in float64, one token at a time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from tests.fakes.layer_caches import contents, layer_cache
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import (
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    INTERPRETED,
    PDL,
    assert_close,
    poisoned,
    random_tensor,
)
from trident_llm.kernels.decode_attention import (
    DecodeConfig,
    allocate_workspace,
    choose_num_splits,
    decode_attention,
)
from trident_llm.kernels.layer_cache import LayerCache
from trident_llm.kernels.prefill_attention import (
    PrefillWorkspace,
    allocate_prefill_workspace,
    choose_prefill_splits,
    prefill_attention,
)

pytestmark = pytest.mark.gpu

CHUNKS = [Chunk(0, 0, 150), Chunk(1, 30, 33), Chunk(2, 0, 1), Chunk(3, 97, 2), Chunk(4, 140, 17)]
"""Whole prompts, one of a single token, and later chunks."""
DECODES = [Chunk(0, 159, 1), Chunk(1, 0, 1), Chunk(2, 63, 1), Chunk(3, 64, 1), Chunk(4, 100, 1)]


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype | None = None
    v_size: float = 1.0


EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
CASES = [
    *(Case(dtype=dtype) for dtype in DTYPES),
    Case(heads=(8, 2), head_dim=128, window=40, soft_cap=5.0, dtype=HALF_DTYPES[-1]),
    Case(heads=(4, 4), head_dim=80, block_size=8, dtype=HALF_DTYPES[-1]),
    Case(heads=(7, 1), head_dim=96, block_size=128, dtype=HALF_DTYPES[-1]),
    Case(heads=(2, 1), head_dim=256, block_size=32, window=17, dtype=HALF_DTYPES[-1]),
    *(Case(heads=(8, 2), head_dim=128, cache_dtype=stored, dtype=HALF_DTYPES[-1]) for stored in EIGHT_BITS),
    *(Case(head_dim=80, window=40, soft_cap=5.0, cache_dtype=stored, dtype=torch.float32) for stored in EIGHT_BITS),
    # The product of a small scale and a small probability lies below float16's normal numbers.
    *(Case(cache_dtype=stored, v_size=1e-3) for stored in EIGHT_BITS),
]


def counts(num_decodes: int, num_seqs: int) -> torch.Tensor:
    return torch.tensor([num_decodes, num_seqs], dtype=torch.int32, device=DEVICE)


def prefill_workspace(q: torch.Tensor, num_splits: int) -> PrefillWorkspace | None:
    if num_splits == 1:
        return None
    workspace = allocate_prefill_workspace(q, num_splits)
    for tensor in (workspace.partials, workspace.log_sums):
        tensor.fill_(float("nan"))
    return workspace


class PagedCase:
    """A filled cache and queries for chunks; ``expected`` is what attention over them is."""

    def __init__(self, case: Case, chunks: list[Chunk]) -> None:
        num_heads, num_kv_heads = case.heads
        self.steps = PagedSteps(6, max_len=160, block_size=case.block_size, device=DEVICE)
        self.metadata = self.steps.metadata(chunks)
        shape = (self.steps.num_blocks, case.block_size, 2, num_kv_heads, case.head_dim)
        total = sum(chunk.num_tokens for chunk in chunks)
        self.q = random_tensor(total, num_heads, case.head_dim, dtype=case.dtype, seed=1)
        self.scale = 1.5 * case.head_dim**-0.5
        # Every slot holds something, so that reading one slot too many shows.
        values = random_tensor(*shape, dtype=case.dtype)
        values[:, :, 1] *= case.v_size
        self.cache = layer_cache(values, case.cache_dtype)
        self.expected = self._attend(case, chunks, contents(self.cache).view(-1, 2, num_kv_heads, case.head_dim))

    def _attend(self, case: Case, chunks: list[Chunk], slots: torch.Tensor) -> torch.Tensor:
        group = case.heads[0] // case.heads[1]
        rows = []
        for chunk in chunks:
            ids = self.steps.slots(chunk.seq, 0, chunk.start + chunk.num_tokens)
            k, v = slots[ids].repeat_interleave(group, 2).unbind(1)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                first = 0 if case.window is None else max(0, position - case.window + 1)
                query = self.q[len(rows)].double()
                scores = torch.einsum("hd,nhd->hn", query, k[first : position + 1]) * self.scale
                if case.soft_cap is not None:
                    scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
                rows.append(torch.einsum("hn,nhd->hd", torch.softmax(scores, 1), v[first : position + 1]))
        return torch.stack(rows)


def with_splits(first: int, *others: int) -> list[tuple[Case, int]]:
    """Every case with ``first`` splits, and with the others; the interpreter, which takes seconds, every third."""
    fewer = CASES[::3] if INTERPRETED else CASES
    return [*((case, first) for case in CASES), *itertools.product(fewer, others)]


# With small tiles of keys each of 3 splits has several; with large ones, the last has none.
@pytest.mark.parametrize(("case", "num_splits"), with_splits(1, 3), ids=str)
def test_prefill(case: Case, num_splits: int) -> None:
    paged = PagedCase(case, CHUNKS)
    # Rows around the chunks belong to others: the launcher takes rows from cu_seqlens_q on.
    q = torch.cat([poisoned(2, *paged.q.shape[1:], dtype=case.dtype), paged.q])
    out = poisoned(*q.shape, dtype=case.dtype)
    prefill_attention(
        q, paged.cache, paged.metadata.block_tables, paged.metadata.cu_seqlens_q + 2, paged.metadata.context_lens,
        counts(0, len(CHUNKS)), out, max_tokens=paged.q.shape[0], max_seqs=len(CHUNKS), scale=paged.scale,
        soft_cap=case.soft_cap, sliding_window=case.window, workspace=prefill_workspace(q, num_splits), pdl=PDL,
    )  # fmt: skip
    assert out[:2].isnan().all()
    assert_close(out[2:], paged.expected)


@pytest.mark.parametrize(("case", "num_splits"), with_splits(3, 1, 40), ids=str)
def test_decode(case: Case, num_splits: int) -> None:
    paged = PagedCase(case, DECODES)
    num_seqs, num_heads, head_dim = paged.q.shape
    workspace = allocate_workspace(num_seqs, num_heads, num_splits, head_dim, paged.q.device)
    for tensor in (workspace.partials, workspace.log_sums):
        tensor.fill_(float("nan"))
    out = poisoned(*paged.q.shape, dtype=case.dtype)
    decode_attention(
        paged.q, paged.cache, paged.metadata.block_tables, paged.metadata.context_lens, paged.metadata.seq_counts, out,
        workspace, num_splits=num_splits, scale=paged.scale, soft_cap=case.soft_cap, sliding_window=case.window,
        config=DecodeConfig(32, 4, 2), pdl=PDL,
    )  # fmt: skip
    assert_close(out, paged.expected)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_rows_that_pad_a_batch_give_zeros(num_splits: int) -> None:
    paged = PagedCase(Case(), DECODES)
    context_lens = paged.metadata.context_lens.clone()
    context_lens[1] = 0
    out = poisoned(*paged.q.shape, dtype=paged.q.dtype)
    decode_attention(
        paged.q, paged.cache, paged.metadata.block_tables, context_lens, paged.metadata.seq_counts, out,
        allocate_workspace(5, 6, num_splits, 64, paged.q.device), num_splits=num_splits, scale=paged.scale, pdl=PDL,
    )  # fmt: skip
    assert out[1].eq(0).all()
    others = [0, 2, 3, 4]
    assert_close(out[others], paged.expected[others])


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sequences_without_tokens_and_rows_that_pad_a_step_are_harmless(num_splits: int) -> None:
    paged = PagedCase(Case(), CHUNKS[:2])
    metadata = paged.metadata
    tables = torch.cat([metadata.block_tables, metadata.block_tables[:1]])
    starts = torch.cat([metadata.cu_seqlens_q, metadata.cu_seqlens_q[-1:]])
    contexts = torch.cat([metadata.context_lens, metadata.context_lens.new_zeros(1)])
    num_tokens = len(paged.q)
    q = torch.cat([paged.q, poisoned(77, *paged.q.shape[1:], dtype=paged.q.dtype)])
    out = poisoned(*q.shape, dtype=q.dtype)
    prefill_attention(
        q, paged.cache, tables, starts, contexts, counts(0, 3), out, max_tokens=len(q), max_seqs=5,
        scale=paged.scale, workspace=prefill_workspace(q, num_splits), pdl=PDL,
    )  # fmt: skip
    assert_close(out[:num_tokens], paged.expected)
    assert out[num_tokens:].isnan().all()


MIXED = [*DECODES[:3], *CHUNKS[3:]]


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_mixed_step_is_shared_between_decode_and_prefill_by_counts_on_the_device(num_splits: int) -> None:
    """Both kernels see all sequences, with room for more of either kind than there are."""
    case = Case(dtype=HALF_DTYPES[-1])
    paged = PagedCase(case, MIXED)
    out = poisoned(*paged.q.shape, dtype=case.dtype)
    step = paged.metadata
    decode_attention(
        paged.q[:5], paged.cache, step.block_tables, step.context_lens, step.seq_counts, out[:5],
        allocate_workspace(5, 6, num_splits, 64, paged.q.device), num_splits=num_splits, scale=paged.scale, pdl=PDL,
    )  # fmt: skip
    assert out[3:].isnan().all()
    prefill_attention(
        paged.q, paged.cache, step.block_tables, step.cu_seqlens_q, step.context_lens, step.seq_counts, out,
        max_tokens=64, max_seqs=9, scale=paged.scale, workspace=prefill_workspace(paged.q, num_splits), pdl=PDL,
    )  # fmt: skip
    assert_close(out, paged.expected)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_prefill_of_a_step_without_prompts_writes_nothing(num_splits: int) -> None:
    paged = PagedCase(Case(), DECODES)
    out = poisoned(*paged.q.shape, dtype=paged.q.dtype)
    prefill_attention(
        paged.q, paged.cache, paged.metadata.block_tables, paged.metadata.cu_seqlens_q, paged.metadata.context_lens,
        counts(5, 5), out, max_tokens=64, max_seqs=3, scale=paged.scale,
        workspace=prefill_workspace(paged.q, num_splits), pdl=PDL,
    )  # fmt: skip
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_scales_of_slots_that_hold_nothing_are_not_read(dtype: torch.dtype) -> None:
    paged = PagedCase(Case(cache_dtype=dtype), MIXED)
    own = [slot for chunk in MIXED for slot in paged.steps.slots(chunk.seq, 0, chunk.start + chunk.num_tokens)]
    scales = torch.full_like(paged.cache.scales, float("inf"))
    scales.view(-1, 4)[own] = paged.cache.scales.view(-1, 4)[own]
    cache, step = LayerCache(paged.cache.values, scales), paged.metadata
    out = poisoned(*paged.q.shape, dtype=paged.q.dtype)
    decode_attention(
        paged.q[:3], cache, step.block_tables[:3], step.context_lens[:3], step.seq_counts, out[:3],
        allocate_workspace(3, 6, 3, 64, paged.q.device), num_splits=3, scale=paged.scale, pdl=PDL,
    )  # fmt: skip
    prefill_attention(
        paged.q, cache, step.block_tables, step.cu_seqlens_q, step.context_lens, step.seq_counts, out,
        max_tokens=64, max_seqs=2, scale=paged.scale, workspace=prefill_workspace(paged.q, 3), pdl=PDL,
    )  # fmt: skip
    assert_close(out, paged.expected)


def test_splits_fill_the_processors_but_not_beyond_the_context() -> None:
    assert choose_num_splits(64, 8, 4096, 132) == 1
    assert choose_num_splits(1, 8, 32768, 132) > 32
    assert choose_num_splits(1, 8, 100, 132) == 1


def test_splits_of_prompts_fill_the_processors_but_not_beyond_the_keys() -> None:
    assert choose_prefill_splits(1, 8, 32768, 132) == 16
    assert choose_prefill_splits(8, 8, 32768, 132) == 4
    assert choose_prefill_splits(3, 8, 32768, 132) == 8
    assert choose_prefill_splits(1, 8, 300, 132) == 2
    assert choose_prefill_splits(64, 8, 32768, 132) == 1
