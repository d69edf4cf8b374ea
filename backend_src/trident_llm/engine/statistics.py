"""What an engine tells of itself: counters and gauges, by the names they have as metrics without ``trident_``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import EngineCore


def statistics(core: EngineCore) -> dict[str, Any]:
    """Counters since the start, and how things stand now."""
    running, tier, blocks, model = len(core.scheduler.running), core.blocks.host_tier, core.blocks, core.model
    return {
        "running_requests": running,
        "waiting_requests": core.num_unfinished - running,
        "queue_places": core.num_places,
        "peak_running_requests": core.scheduler.peak_running,
        "kv_blocks_total": blocks.num_blocks,
        "kv_blocks_used": blocks.num_used,
        "kv_blocks_cached": blocks.num_cached,
        "kv_blocks_allocated_total": core.block_totals.allocated,
        "kv_blocks_freed_total": core.block_totals.freed,
        "kv_blocks_evicted_total": core.block_totals.evicted,
        "prefix_cache_query_tokens_total": blocks.num_query_tokens,
        "prefix_cache_hit_tokens_total": blocks.num_hit_tokens,
        "preemptions_total": core.scheduler.num_preemptions,
        "swapped_blocks_total": tier.num_swapped if tier else 0,
        "host_blocks_total": tier.num_blocks if tier else 0,
        "host_blocks_used": tier.num_used if tier else 0,
        "step_seconds_total": round(core.step_seconds, 6),
        **core.counters,
        **(core.adapters.stats() if core.adapters else {}),
        "adapter_usage": core.request_metrics.adapters.to_dict(),
        "requantize_jobs": core.jobs.counts(),
        "memory": memory(core),
        "quantization": model.quantization.to_dict() if model.quantization else None,
        "isq_method": core.config.isq_method,
        "calibration": core.live_text.describe(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
    }


def memory(core: EngineCore) -> dict[str, int]:
    """Bytes by use, on the model's device and, of the host tier, beside it."""
    model = core.model
    return {
        "weights_bytes_before": model.weights_bytes_before,
        "weights_bytes_after": model.weights_bytes_after,
        "adapter_slot_bytes": core.adapters.device.num_bytes if core.adapters else 0,
        "step_bytes": model.step_bytes,
        "kv_cache_bytes": model.kv_cache.num_bytes,
        "graph_bytes": core.runner.graph_bytes,
        "host_tier_bytes": model.num_host_blocks * model.kv_cache.block_bytes,
    }
