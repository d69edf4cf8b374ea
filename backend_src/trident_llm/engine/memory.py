"""How much GPU memory a step needs besides weights and KV cache: measured by running the largest one."""

from __future__ import annotations

import torch

from ..kernels.lora_layer import LoraRows, num_tiles
from ..models.llama import LlamaDecoder
from .batch import AttentionMetadata, ModelInput, StepAdapters
from .kv_cache import KVCache

_SAMPLER_BYTES = 9
"""Per sequence and vocabulary entry: an int32 count, a prompt flag and a float32 logit."""


@torch.inference_mode()
def worst_step_bytes(
    decoder: LlamaDecoder,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    block_size: int,
    kv_cache_dtype: torch.dtype,
    num_adapter_slots: int,
) -> int:
    """Peak bytes of a step with ``max_num_batched_tokens`` prompt tokens and logits for ``max_num_seqs`` rows.

    With slots for adapters the step has room for what its tokens take of them.
    """
    device = decoder.device
    num_blocks = -(-max_num_batched_tokens // block_size)
    kv_cache = KVCache(
        decoder.config, num_blocks=num_blocks, block_size=block_size, dtype=kv_cache_dtype, device=device
    )
    tokens = torch.arange(max_num_batched_tokens, device=device)
    attention = AttentionMetadata(
        slot_mapping=tokens,
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        cu_seqlens_q=torch.tensor([0, max_num_batched_tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([max_num_batched_tokens], dtype=torch.int32, device=device),
        seq_lens_q=(max_num_batched_tokens,),
        context_lens_host=(max_num_batched_tokens,),
        seq_counts=torch.tensor([0, 1], dtype=torch.int32, device=device),
        num_decodes=0,
        num_prefills=1,
        block_size=block_size,
    )
    model_input = ModelInput(
        token_ids=tokens % decoder.config.vocab_size,
        positions=tokens % decoder.max_model_len,
        logits_rows=tokens[:max_num_seqs],
        attention=attention,
        adapters=_no_adapters(max_num_batched_tokens, max_num_seqs, num_adapter_slots, device),
    )
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    decoder.forward(model_input, kv_cache)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _no_adapters(num_tokens: int, num_rows: int, num_slots: int, device: torch.device) -> StepAdapters | None:
    """Workspaces depend on the numbers of rows and slots, not on what is in them."""
    if not num_slots:
        return None

    def rows(count: int) -> LoraRows:
        tiles = torch.full((1 + num_tiles(count), num_slots), -1, dtype=torch.int32, device=device)
        return LoraRows(torch.zeros(1, count, num_slots, device=device), tiles)

    return StepAdapters(rows(num_tokens), rows(num_rows))


def pool_budget(
    decoder: LlamaDecoder,
    *,
    step_bytes: int,
    gpu_memory_utilization: float,
    max_num_seqs: int,
    max_model_len: int,
    block_size: int,
    mix_bytes: int,
) -> int:
    """Bytes left for the KV pool on the decoder's GPU.

    Kept back: what is in use now, the worst step (``step_bytes``), as much again for the CUDA graphs (whose largest is
    smaller than that step), what the sampler keeps, three copies of the block tables and ``mix_bytes``.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(decoder.device)
    sampler = max_num_seqs * decoder.config.vocab_size * _SAMPLER_BYTES
    tables = 3 * 4 * max_num_seqs * -(-max_model_len // block_size)
    return int(total * gpu_memory_utilization) - (total - free) - 2 * step_bytes - sampler - tables - mix_bytes
