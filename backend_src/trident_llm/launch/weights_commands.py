"""``trident quantize`` and ``trident estimate``: what can be done with a model's weights without a server."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

from ..config import EngineConfig
from ..errors import BadRequest
from ..quantization.estimate import Estimate, estimate_memory

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "TB": 10**12}


def quantize(arguments: Namespace) -> int:
    """Quantize a model and write it as a folder. The head stays in full precision unless a rule says otherwise: vLLM
    reads no other."""
    import torch

    from ..quantization.export import quantize_to_folder

    settings = _settings(arguments)
    settings["isq_layers"] = "; ".join(filter(None, ("lm_head=none", settings.get("isq_layers", ""))))
    config = EngineConfig.from_parameters(settings)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    out = Path(arguments.out).expanduser()
    report = quantize_to_folder(config, out, lambda text: print(text, flush=True))
    print(f"wrote {out}: {report.average_bits:.2f} bits a weight in the decoder layers")
    return 0


def estimate(arguments: Namespace) -> int:
    """Print what a model takes, before and after quantization."""
    config = EngineConfig.from_parameters(_settings(arguments))
    found = estimate_memory(config, _gpu_memory(arguments.gpu_memory, config))
    length = arguments.stream_tokens
    if length is not None:
        _check_stream_tokens(length, found)
    if arguments.json:
        streams = {} if length is None else {"stream_tokens": length, "streams": found.streams(length)}
        print(json.dumps({**found.to_dict(), **streams}, indent=2), flush=True)
        return 0
    print(estimate_text(found), flush=True)
    if length is not None:
        print(streams_text(found, length, config.max_num_seqs), flush=True)
    return 0


def estimate_text(found: Estimate) -> str:
    """A line per group, and what is left."""
    rows = [(group.name, group.before, group.after) for group in found.groups]
    lines = [f"{'weights, MiB':<14}{found.dtype:>12}{'loaded':>12}"]
    for name, before, after in [*rows, ("total", found.before, found.after)]:
        lines.append(f"{name:<14}{before / 2**20:>12,.1f}{after / 2**20:>12,.1f}")
    lines.append(f"\nloaded takes {found.after / found.before:.3f} of {found.dtype}, on {found.device}")
    lines.append(f"KV cache: {found.kv_bytes_per_token / 2**10:,.1f} KiB a token")
    if found.gpu_memory is not None and found.kv_room is not None and found.kv_tokens is not None:
        room = f"about {found.kv_room / 2**30:,.1f} GiB, {found.kv_tokens:,} tokens"
        context = min(found.kv_tokens, found.max_model_len)
        lines.append(
            f"a GPU of {found.gpu_memory / 2**30:,.1f} GiB leaves it {room}: a context of {context:,} tokens, "
            f"{found.kv_tokens / found.max_model_len:,.1f} sequences of {found.max_model_len:,}"
        )
    return "\n".join(lines)


def streams_text(found: Estimate, length: int, max_num_seqs: int) -> str:
    """How many streams of so many tokens have room, and what that is made of."""
    blocks = f"{found.kv_tokens:,} / ({found.block_size} x ceil({length:,} / {found.block_size}))"
    streams = f"streams of {length:,} tokens: {blocks} = {found.streams(length):,} at once, none preempted"
    return f"{streams}; max_num_seqs lets {max_num_seqs:,} run"


def _check_stream_tokens(length: int, found: Estimate) -> None:
    if found.kv_tokens is None:
        raise BadRequest("--stream-tokens: the KV cache's room is only known for a GPU; give --gpu-memory, too")
    if not 1 <= length <= found.max_model_len:
        raise BadRequest(f"--stream-tokens: {length} is not allowed; give a number from 1 to {found.max_model_len}")


def _settings(arguments: Namespace) -> dict[str, str]:
    """Settings by name; --method, --bits and --group-size are short for three of them."""
    settings = {"model": arguments.model}
    for name, value in arguments.set:
        if name in settings:
            raise BadRequest(f"--set {name}: given twice")
        settings[name] = value
    for option, name in (("method", "isq_method"), ("bits", "isq_bits"), ("group_size", "isq_group_size")):
        value = getattr(arguments, option)
        if value is not None:
            if name in settings:
                raise BadRequest(f"--{option.replace('_', '-')} and --set {name}=... are the same; give one of them")
            settings[name] = value
    return settings


def _gpu_memory(text: str | None, config: EngineConfig) -> int | None:
    """Bytes; without a text those of this machine's GPU, or None where there is none or ``device`` says cpu."""
    if text is not None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
        if match is None or match[2].upper() not in _UNITS or not float(match[1]):
            raise BadRequest(f"--gpu-memory {text!r}: give a size such as 80GiB or 24GB")
        return int(float(match[1]) * _UNITS[match[2].upper()])
    import torch

    from ..engine.loading import choose_device

    device = choose_device(config.device)
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
