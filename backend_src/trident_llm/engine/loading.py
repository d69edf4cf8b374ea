"""From settings to a decoder and a KV cache on a device. Decides device, dtype, context length and pool size."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch

from ..adapters.loading import make_store
from ..adapters.store import AdapterStore
from ..config import KV_CACHE_DTYPES, EngineConfig
from ..errors import BadRequest, LoadFailed, NotFound
from ..models.config_reader import read_model_config
from ..models.llama import LlamaDecoder
from ..models.model_config import ModelConfig
from ..models.source import ModelSource, resolve_model
from ..models.tokenizer_files import byte_tokenizer_folder, prepare_tokenizer
from ..models.weights import DummyWeights, WeightReader, expected_shapes, iter_weights, open_weights
from ..quantization.cache import files_identity
from ..quantization.loading import Quantization, QuantizationReport
from .kv_cache import KVCache, bytes_per_block
from .memory import pool_budget, worst_step_bytes
from .mix_pass import count_modules

Progress = Callable[[str], None]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_KV_CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Those that differ from the model's."""
_FP8_CAPABILITY = (8, 9)
"""The first with instructions that convert to and from fp8."""
_CPU_POOL_SHARE = 0.1
"""Share of the free host memory that the KV pool takes on a CPU."""


@dataclass(frozen=True)
class LoadedModel:
    """All that a model runner and a door need. ``max_model_len`` fits the pool."""

    name: str
    config: ModelConfig
    decoder: LlamaDecoder
    kv_cache: KVCache
    tokenizer_folder: Path
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    num_host_blocks: int
    """Of the host tier."""
    adapters: AdapterStore | None
    """None where the settings leave no room for any."""
    weights_bytes_before: int
    """Every parameter once, in ``dtype``."""
    weights_bytes_after: int
    """As they lie on the device."""
    quantization: QuantizationReport | None
    """None: all weights are in full precision."""
    step_bytes: int
    """What the largest step takes besides; 0 on a CPU, where nobody keeps it back."""
    source: DecoderSource
    samples_digest: str
    """Of the text that the weights were calibrated on; empty without one."""


class DecoderSource:
    """The files of one model, and decoders made of them under any settings of quantization."""

    def __init__(self, config: EngineConfig, device: torch.device, progress: Progress) -> None:
        """Raises ``BadRequest``, ``NotFound`` or ``LoadFailed``."""
        self._dummy = config.load_format == "dummy"
        self._files = resolve_model(config.model, config.revision, weights=not self._dummy, progress=progress)
        self.model_config = _with_sliding_window(read_model_config(self._files), config.sliding_window)
        self.device = device
        self.dtype = choose_dtype(config.dtype, self.model_config.dtype, device)
        self.max_model_len = _context_length(config.max_model_len, self.model_config)

    def prepare_tokenizer(self, progress: Progress) -> Path:
        """Its folder. To be called before ``read_calibration``."""
        self._tokenizer_folder = _tokenizer_folder(self._files, self.model_config, progress, dummy=self._dummy)
        return self._tokenizer_folder

    def quantization(self, config: EngineConfig) -> Quantization:
        """What the settings ``isq_*`` come to. Raises ``BadRequest`` when they do not fit the model or the device."""
        return Quantization(config, self.model_config, self.device)

    def read_calibration(self, quantization: Quantization, progress: Progress, *, kept_digest: str = "") -> None:
        """Raises ``BadRequest`` for unusable text. None is needed where the disk has what was made on that of
        ``kept_digest``."""
        if not (kept_digest and quantization.find_kept(kept_digest, self.dtype, self._identity(), progress)):
            quantization.read_calibration(self._tokenizer_folder, self.max_model_len)

    def build(self, quantization: Quantization, progress: Progress) -> BuiltDecoder:
        """Read, quantize and pack the weights. Raises ``LoadFailed``, or ``BadRequest`` where no bits keep a bound."""
        decoder = LlamaDecoder(
            self.model_config, dtype=self.dtype, device=self.device, max_model_len=self.max_model_len
        )
        reader: WeightReader
        if self._dummy:
            reader = DummyWeights(self.model_config, dtype=self.dtype, device=self.device)
        else:
            reader = open_weights(self._files, self.model_config, dtype=self.dtype, device=self.device)
        if quantization.enabled:
            return BuiltDecoder(decoder, quantization.load(decoder, reader, self._identity(), progress))
        decoder.load_weights(iter_weights(reader, _Percent(progress)))
        return BuiltDecoder(decoder, None)

    def _identity(self) -> str:
        """A text that no other weights have. Random ones depend on the kind of device."""
        if self._dummy:
            return f"dummy on {self.device.type}, torch {torch.__version__}"
        return files_identity(self._files.weight_files)


@dataclass(frozen=True)
class BuiltDecoder:
    decoder: LlamaDecoder
    report: QuantizationReport | None
    """None: all weights are as the files have them."""


def load_model(
    config: EngineConfig, progress: Progress, adapter_folder: Path | None = None, *, kept_digest: str = ""
) -> LoadedModel:
    """Load what ``config`` names. Raises BadRequest, NotFound or LoadFailed.

    ``adapter_folder`` keeps the engine's copies of adapters for one that takes its place; None: nobody will.
    ``kept_digest``: of the calibration text that these weights were made on before, if they were.
    """
    device = choose_device(config.device)
    if device.type == "cpu" and (config.num_threads or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    source = DecoderSource(config, device, progress)
    quantization = source.quantization(config)
    model_config, dtype, max_model_len = source.model_config, source.dtype, source.max_model_len
    kv_cache_dtype = choose_kv_cache_dtype(config.kv_cache_dtype, dtype, device)
    tokenizer_folder = source.prepare_tokenizer(progress)
    source.read_calibration(quantization, progress, kept_digest=kept_digest)
    built = source.build(quantization, progress)
    decoder = built.decoder
    adapters = make_store(config, decoder, adapter_folder, progress)
    step_bytes = _step_bytes(config, decoder, kv_cache_dtype)
    num_blocks = _pool_blocks(config, decoder, max_model_len, kv_cache_dtype, step_bytes)
    if num_blocks * config.block_size < max_model_len:
        if config.max_model_len:
            raise BadRequest(
                f"max_model_len: {max_model_len} tokens do not fit the KV pool of {num_blocks} blocks of "
                f"{config.block_size} tokens; allowed: at most {num_blocks * config.block_size}"
            )
        max_model_len = num_blocks * config.block_size
    kv_cache = KVCache(
        model_config, num_blocks=num_blocks, block_size=config.block_size, dtype=kv_cache_dtype, device=device
    )
    progress(f"KV pool: {num_blocks} blocks of {config.block_size} tokens, {kv_cache.num_bytes / 2**20:.0f} MiB")
    return LoadedModel(
        name=config.model,
        config=model_config,
        decoder=decoder,
        kv_cache=kv_cache,
        tokenizer_folder=tokenizer_folder,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        num_host_blocks=_host_blocks(config, device, kv_cache.block_bytes),
        adapters=adapters,
        weights_bytes_before=sum(map(prod, expected_shapes(model_config).values())) * dtype.itemsize,
        weights_bytes_after=decoder.num_bytes,
        quantization=built.report,
        step_bytes=step_bytes,
        source=source,
        samples_digest=quantization.samples_digest,
    )


def choose_device(name: str) -> torch.device:
    """The device for a setting auto | cuda | cpu."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadRequest("device: cuda, but PyTorch sees no CUDA device here; allowed: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype for a setting auto | bf16 | fp16 | fp32."""
    if name == "fp16" and device.type == "cpu":
        raise BadRequest("dtype: fp16 is not available on the CPU; allowed: auto, bf16, fp32")
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.float16 if checkpoint == "fp16" else torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def choose_kv_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The KV cache's dtype for a setting auto | bf16 | fp16 | fp8 | int8 and a model of ``dtype``."""
    own = next(own for own, value in _DTYPES.items() if value == dtype)
    found = {"auto": dtype, own: dtype, **_KV_CACHE_DTYPES}
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        del found["fp8"]
    if name in found:
        return found[name]
    reason = (
        f"needs a GPU of compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or later"
        if name == "fp8"
        else f"is not the model's dtype ({own})"
    )
    allowed = ", ".join(choice for choice in KV_CACHE_DTYPES if choice in found)
    raise BadRequest(f"kv_cache_dtype: {name} {reason}; allowed here: {allowed}")


def _with_sliding_window(config: ModelConfig, window: int | None) -> ModelConfig:
    return config if window is None else dataclasses.replace(config, sliding_window=window or None)


def _context_length(asked: int, config: ModelConfig) -> int:
    limit = config.max_position_embeddings
    if asked > limit:
        raise BadRequest(f"max_model_len: {asked} is more than the model's own limit; allowed: at most {limit}")
    return asked or limit


def _tokenizer_folder(source: ModelSource, config: ModelConfig, progress: Progress, *, dummy: bool) -> Path:
    try:
        return prepare_tokenizer(source, progress=progress)
    except NotFound:
        if not dummy:
            raise
        return byte_tokenizer_folder(config.vocab_size)


def _step_bytes(config: EngineConfig, decoder: LlamaDecoder, kv_cache_dtype: torch.dtype) -> int:
    if decoder.device.type != "cuda":
        return 0
    return worst_step_bytes(
        decoder,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size,
        kv_cache_dtype=kv_cache_dtype,
        num_adapter_slots=config.num_adapter_slots,
    )


def _pool_blocks(
    config: EngineConfig, decoder: LlamaDecoder, max_model_len: int, kv_cache_dtype: torch.dtype, step_bytes: int
) -> int:
    """Blocks of the pool: the setting, else what fits, and never more than all sequences at full length need."""
    if config.max_num_blocks is not None:
        return config.max_num_blocks
    block_bytes = bytes_per_block(decoder.config, block_size=config.block_size, dtype=kv_cache_dtype)
    if decoder.device.type == "cuda":
        budget = pool_budget(
            decoder,
            step_bytes=step_bytes,
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.block_size,
            mix_bytes=_mix_bytes(config, decoder),
        )
    else:
        budget = int(psutil.virtual_memory().available * _CPU_POOL_SHARE)
    # With a mix a sequence has K and V of two passes.
    most = (2 if config.xlora else 1) * config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(budget // block_bytes, most)
    if num_blocks < 1:
        raise LoadFailed(
            f"no memory is left for the KV pool on {decoder.device}: a block takes {block_bytes} bytes, "
            f"{max(budget, 0)} are left; choose a smaller model, a larger gpu_memory_utilization, or set max_num_blocks"
        )
    return num_blocks


def _mix_bytes(config: EngineConfig, decoder: LlamaDecoder) -> int:
    """Weights by module that graphs of steps with a mix read, and the first pass's hidden states and block tables."""
    if not config.xlora:
        return 0
    weights = count_modules(decoder.adaptable_linears()) * config.num_adapter_slots * torch.float32.itemsize
    hidden = decoder.config.hidden_size * decoder.dtype.itemsize
    tables = 2 * 4 * config.max_num_seqs * -(-decoder.max_model_len // config.block_size)
    return config.max_num_batched_tokens * (2 * weights + hidden) + tables


def _host_blocks(config: EngineConfig, device: torch.device, block_bytes: int) -> int:
    """Blocks of the host tier for the setting ``kv_host_memory``."""
    asked, available = config.kv_host_memory, psutil.virtual_memory().available
    if not asked:
        return 0
    if device.type != "cuda":
        raise BadRequest("kv_host_memory: on a CPU the KV pool lies in host memory already; allowed: 0")
    if not config.prefix_caching:
        raise BadRequest("kv_host_memory: blocks are found again by the prefix cache, which is off; allowed: 0")
    if not block_bytes <= asked <= available:
        raise BadRequest(
            f"kv_host_memory: {asked} is not allowed; give 0, or from {block_bytes} (a block) to {available} bytes "
            "(free here)"
        )
    return asked // block_bytes


class _Percent:
    """Turns fractions into progress lines, one per 10%."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._next = 0

    def __call__(self, fraction: float) -> None:
        percent = int(fraction * 100)
        if percent >= self._next:
            self._progress(f"loading weights: {percent}%")
            self._next = percent + 10
