"""What a model's weights will take before and after quantization, and what a GPU then has left for the KV cache.

From config.json and the headers of the weight files alone: a few rows of every format are packed by the kernels' own
code, and their bytes are scaled up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..engine.kv_cache import bytes_per_block
from ..engine.loading import choose_dtype
from ..errors import BadRequest
from ..kernels import reference
from ..kernels.packed_bytes import pack_quantized
from ..kernels.quantized_weight import Activations, QuantizedWeight
from ..models.config_reader import read_model_config
from ..models.model_config import ModelConfig
from ..models.quantized_checkpoint import StoredWeight
from ..models.source import find_safetensors, resolve_model
from ..models.weights import expected_shapes, stored_weights
from .modules import HEAD, Module, model_modules
from .scheme import LinearScheme, QuantizationSettings, make_plan

GROUPS = ("embedding", "attention", "mlp", "norms", "head")
_KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_SAMPLE_OUTPUTS = 64
"""Outputs of a weight that is packed to be counted: every layout takes as many bytes for each multiple of it."""
_UNPACK_ROWS = 384
_LOGIT_BYTES = 13
"""Per sequence and vocabulary entry: a logit in two dtypes, an int32 count and a flag."""
_RESERVED_BYTES = 600 << 20
"""What the driver and its libraries keep of a GPU."""


@dataclass(frozen=True)
class GroupMemory:
    name: str
    before: int
    """Bytes in the model's dtype, each parameter once."""
    after: int
    """Bytes as they lie on the device."""


@dataclass(frozen=True)
class Estimate:
    device: str
    dtype: str
    groups: tuple[GroupMemory, ...]
    kv_bytes_per_token: int
    gpu_memory: int | None
    """None on a CPU."""
    kv_room: int | None
    """Bytes; None on a CPU, 0 when the model does not fit."""
    max_model_len: int
    block_size: int

    @property
    def before(self) -> int:
        return sum(group.before for group in self.groups)

    @property
    def after(self) -> int:
        return sum(group.after for group in self.groups)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the KV cache has room for."""
        return None if self.kv_room is None else self.kv_room // self.kv_bytes_per_token

    def streams(self, num_tokens: int) -> int | None:
        """Sequences of ``num_tokens`` tokens, prompt and output, that the KV cache holds at once, in whole blocks."""
        return None if self.kv_tokens is None else self.kv_tokens // _in_blocks(num_tokens, self.block_size)

    def to_dict(self) -> dict[str, Any]:
        totals = {"weights_bytes_before": self.before, "weights_bytes_after": self.after, "kv_tokens": self.kv_tokens}
        return {**dataclasses.asdict(self), **totals}


def estimate_memory(config: EngineConfig, gpu_memory: int | None) -> Estimate:
    """gpu_memory: bytes of the GPU; None for a CPU. Raises ``BadRequest``, ``NotFound`` or ``LoadFailed``."""
    if config.isq_max_loss:
        raise BadRequest(
            f"isq_max_loss: {config.isq_max_loss:g}: which layers get how many bits is only known once they are "
            "measured; leave it at 0, and name bits with isq_bits and isq_layers"
        )
    source = resolve_model(config.model, config.revision, weights=False)
    model_config = read_model_config(source)
    stored: Mapping[str, StoredWeight] = {}
    local = not source.revision and (source.format == "gguf" or bool(find_safetensors(source.folder)))
    if local or model_config.quantization is not None:
        stored = stored_weights(resolve_model(config.model, config.revision), model_config)
    device = torch.device("cpu" if gpu_memory is None else "cuda")
    dtype = choose_dtype(config.dtype, model_config.dtype, device)
    kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
    block_bytes = bytes_per_block(model_config, block_size=config.block_size, dtype=kv_dtype)
    sizes = _Sizes(config, model_config, stored, device, dtype)
    groups = tuple(GroupMemory(name, sizes.before[name], sizes.after[name]) for name in GROUPS)
    weights = sum(group.after for group in groups)
    kv_room = None
    if gpu_memory is not None:
        kept = weights + _RESERVED_BYTES + 2 * _step_bytes(config, model_config, dtype)
        kv_room = max(int(gpu_memory * config.gpu_memory_utilization) - kept, 0)
    return Estimate(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        groups=groups,
        kv_bytes_per_token=block_bytes // config.block_size,
        gpu_memory=gpu_memory,
        kv_room=kv_room,
        max_model_len=config.max_model_len or model_config.max_position_embeddings,
        block_size=config.block_size,
    )


def _in_blocks(num_tokens: int, block_size: int) -> int:
    """The tokens that the blocks of a sequence have room for."""
    return -(-num_tokens // block_size) * block_size


class _Sizes:
    """Bytes of each of GROUPS."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        stored: Mapping[str, StoredWeight],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        settings = QuantizationSettings(config.isq_method, config.isq_bits, config.isq_group_size, config.isq_layers)
        plan = make_plan(settings, model_config)
        shapes = expected_shapes(model_config)
        self._stored = stored
        self._dtype = dtype
        self._pack = reference.pack_linear if device.type == "cpu" else _pack_for_gpu
        self.before = {name: 0 for name in GROUPS}
        for name, shape in shapes.items():
            self.before[_group_of(name)] += prod(shape) * dtype.itemsize
        self.after = dict(self.before)
        for module in model_modules(model_config):
            full = module.num_inputs * module.num_outputs * dtype.itemsize
            scheme = plan[module.name]
            tied = module.name == HEAD and model_config.tie_word_embeddings
            if scheme is None and tied:
                self.after["head"] += 0 if self._shares_embedding() else full
                continue
            group = _group_of(module.name)
            self.after[group] += self._bytes(module, scheme, full) - (0 if tied else full)

    def _shares_embedding(self) -> bool:
        """Whether a head in full precision reads the embedding's own memory."""
        rows = torch.zeros(_SAMPLE_OUTPUTS, 32, dtype=self._dtype)
        return self._pack(rows) is rows

    def _bytes(self, module: Module, scheme: LinearScheme | None, full: int) -> int:
        parts = {self._stored.get(f"{part}.weight") for part in module.parts}
        form = parts.pop() if len(parts) == 1 else None
        if scheme is not None:
            activations: Mapping[str, Activations] = {"smoothquant": "int8", "fp8": "fp8"}
            kind = activations.get(scheme.method, "none")
            form = StoredWeight(scheme.bits, scheme.group_size, kind, scheme.symmetric)
        if form is None:
            return full
        whole, rest = divmod(module.num_outputs, _SAMPLE_OUTPUTS)
        total = whole * _packed_bytes(self._pack, _SAMPLE_OUTPUTS, module.num_inputs, form)
        # Weight-only layouts pad the last outputs, those for 8-bit activations do not.
        return total + (_packed_bytes(self._pack, rest, module.num_inputs, form) if rest else 0)


@functools.cache
def _packed_bytes(pack: Callable[[Any], Any], num_outputs: int, num_inputs: int, form: StoredWeight) -> int:
    groups = (num_outputs, num_inputs // form.group_size)
    kind = torch.float8_e4m3fn if form.activations == "fp8" else torch.uint8
    weight = QuantizedWeight(
        codes=torch.zeros(num_outputs, num_inputs, dtype=kind),
        scales=torch.ones(groups, dtype=torch.float16),
        zero_points=torch.full(groups, 2 ** (form.bits - 1) if form.symmetric else 0, dtype=torch.uint8),
        bits=form.bits,
        group_size=form.group_size,
        activations=form.activations,
    )
    return int(pack(weight).nbytes)


def _pack_for_gpu(weight: Tensor | QuantizedWeight) -> Any:
    """As the kernels in the Triton language do, where there need be no GPU."""
    if isinstance(weight, Tensor):
        return weight
    return pack_quantized(weight)


def _group_of(name: str) -> str:
    words = name.split(".")
    if "self_attn" in words and not words[-2].endswith("_norm"):
        return "attention"
    if "mlp" in words:
        return "mlp"
    if words[0] == HEAD:
        return "head"
    return "embedding" if "embed_tokens" in words else "norms"


def _step_bytes(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> int:
    """What the largest step takes besides, about: a layer's activations, logits, and one unpacked weight."""
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    activations = config.max_num_batched_tokens * (4 * hidden + 3 * inner) * dtype.itemsize
    unpacked = 2 * hidden * inner * dtype.itemsize if config.max_num_batched_tokens > _UNPACK_ROWS else 0
    return activations + unpacked + config.max_num_seqs * model_config.vocab_size * _LOGIT_BYTES
