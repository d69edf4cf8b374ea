"""EngineConfig: every setting of the engine, its type, range and meaning, read from config.pbtxt parameters.

The server hands all parameters over as strings; ``EngineConfig.from_parameters`` is the one place that reads them.
Settings whose feature is not built are declared too, and refused by name when they are set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .adapters.spec import parse_adapter_list
from .errors import BadRequest
from .logs import LOG_FORMATS, LOG_LEVELS
from .protocol import Limits

KV_CACHE_DTYPES = ("auto", "bf16", "fp16", "fp8", "int8")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    available: bool = True,
) -> Any:
    """A dataclass field that carries its documentation and its limits (both ends included)."""
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "maximum": maximum, "available": available}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. Raises ``BadRequest`` when a value is out of range or two values clash."""

    model: str = setting("", "Hugging Face id, or a local folder or .gguf file; safetensors or GGUF weights")
    revision: str = setting("", "branch, tag or commit of a Hugging Face id; empty: main")
    load_format: str = setting(
        "auto", "auto reads the weights; dummy fills them with small random values", choices=("auto", "dummy")
    )
    dtype: str = setting(
        "auto",
        "weights and activations; auto: bf16 where the device is fast at it, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    device: str = setting("auto", "auto: cuda when there is one, else cpu", choices=("auto", "cuda", "cpu"))
    num_threads: int = setting(
        0, "CPU threads of the engine; 0: OMP_NUM_THREADS, or one per core this process may use", minimum=0
    )
    max_model_len: int = setting(0, "longest prompt plus output, in tokens; 0: the model's own limit", minimum=0)
    max_num_seqs: int = setting(256, "most sequences in one step", minimum=1, maximum=65536)
    max_num_batched_tokens: int = setting(
        2048, "most tokens in one step: decodes first, then chunks of prompts", minimum=1
    )
    gpu_memory_utilization: float = setting(
        0.9, "share of the GPU's memory that the engine may use", minimum=0.05, maximum=1.0
    )
    block_size: int = setting(16, "tokens per KV-cache block", choices=("8", "16", "32", "64", "128"))
    max_num_blocks: int | None = setting(None, "KV-cache blocks; empty: what fits", minimum=1)
    kv_cache_dtype: str = setting(
        "auto",
        "K and V in the cache; auto: the model's dtype; int8, and fp8 on GPUs of compute capability 8.9 or later, hold "
        "nearly twice as many tokens as 16 bits",
        choices=KV_CACHE_DTYPES,
    )
    kv_host_memory: int = setting(
        0, "bytes of pinned host memory for blocks that the pool loses; on a GPU", minimum=0
    )
    sliding_window: int | None = setting(
        None, "tokens a position attends to, itself included; empty: the model's own; 0: all", minimum=0
    )
    prefix_caching: bool = setting(True, "share full KV blocks between requests with equal prefixes")
    max_queue_size: int = setting(768, "most requests waiting for their first step; more are refused", minimum=0)
    max_queue_wait: float = setting(
        0.0,
        "longest expected wait for the first step, in seconds, by how quickly others have been ending; requests beyond "
        "are refused; 0: no limit",
        minimum=0.0,
    )
    queue_timeout: float = setting(
        0.0, "seconds a request may wait for its first step; 0: no limit", minimum=0.0
    )
    step_timeout: float = setting(
        600.0, "seconds after which a step counts as hung and the engine is restarted; 0: never", minimum=0.0
    )
    max_engine_failures: int = setting(
        3, "times in a row the engine may end without having completed a step; then it stays down", minimum=1
    )
    drain_timeout: float = setting(
        2.0,
        "seconds that running requests may take to finish when the server ends or their model is unloaded",
        minimum=0.0,
    )
    max_n: int = setting(16, "hard cap of the request option n", minimum=1, maximum=1024)
    max_stop_strings: int = setting(16, "hard cap on stop strings, and on stop_token_ids", minimum=0, maximum=1024)
    max_logprobs: int = setting(20, "hard cap of the request option logprobs", minimum=0, maximum=1024)
    max_prompt_bytes: int = setting(4 * 2**20, "longest text_input or messages, in bytes of UTF-8", minimum=1)
    log_format: str = setting("text", "lines of the log: text, or a JSON object each", choices=LOG_FORMATS)
    log_level: str = setting(
        "info", "least level of what is logged; debug: what happens to each request, too", choices=LOG_LEVELS
    )
    otlp_endpoint: str = setting(
        "", "OpenTelemetry collector, http://HOST:4318, that gets spans of requests with a traceparent; empty: none"
    )
    admin_token: str = setting(
        "", "secret that llm_admin asks for; required when the server listens beyond loopback"
    )
    adapters: str = setting("", "LoRA adapters to load at the start: name=path, ... in PEFT's format")
    adapter_root: str = setting("", "folder below which adapters may be loaded while serving; empty: none may")
    allow_hub_adapters: bool = setting(False, "adapters may be Hugging Face ids")
    max_loras: int = setting(8, "adapters on the device, and so in one step", minimum=1, maximum=1024)
    max_cpu_loras: int = setting(32, "adapters kept in host memory, at least max_loras; others on disk", minimum=1)
    max_lora_rank: int = setting(64, "largest rank of an adapter; each slot has room for it", minimum=1, maximum=1024)
    xlora: str = setting("", "folder of an X-LoRA mix to load at the start")
    routing_method: str = setting(
        "learned",
        "how a mix weighs its adapters; learned: its classifier does, per token; static: all alike, in one pass",
        choices=("learned", "static"),
    )
    top_k_adapters: int | None = setting(
        None, "adapters of a mix per token and module; 0: all; empty: as the mix says", minimum=0
    )
    scaling_factor: float | None = setting(None, "factor on the adapters of a mix; empty: as the mix says")
    freeze_after: int = setting(
        0, "output tokens after which a sequence's scalings stay, and one pass is enough; 0: never", minimum=0
    )
    isq_method: str = setting(
        "none",
        "quantization of the weights while they load: rtn, awq and gptq in 4, 5, 6 or 8 bits with activations as they "
        "are; smoothquant (int8) and fp8 with activations in 8 bits too",
        choices=("rtn", "awq", "gptq", "smoothquant", "fp8", "none"),
    )
    isq_bits: int | None = setting(
        None, "bits per weight; empty: 4, or 8 where the method has no other", minimum=4, maximum=8
    )
    isq_group_size: str = setting(
        "auto",
        "inputs that share a scale; auto: the largest of 128, 64, 32 that divides every layer's inputs; channel: all",
        choices=("auto", "32", "64", "128", "channel"),
    )
    isq_layers: str = setting(
        "",
        "exceptions, the last that matches wins: LAYERS=METHOD:BITS:GROUP; ... with LAYERS a number, a range (0-3) or "
        "a regular expression on names; METHOD may be none",
    )
    isq_calibration: str = setting(
        "", "text, or JSONL of texts or chats, that awq, gptq and smoothquant calibrate on; empty: the one that ships"
    )
    isq_calibration_samples: int = setting(64, "pieces of that text", minimum=1, maximum=65536)
    isq_calibration_length: int = setting(512, "tokens of a piece", minimum=16, maximum=65536)
    isq_max_loss: float = setting(
        0.0,
        "largest relative increase of perplexity on held-out pieces of that text; bits are then chosen for each layer "
        "so that memory is least; 0: isq_bits everywhere",
        minimum=0.0,
        maximum=10.0,
    )
    isq_cache: bool = setting(True, "keep quantized weights on disk, so that the next start reads them in seconds")
    tensor_parallel_size: int = setting(1, "GPUs that share the model", minimum=1, available=False)
    speculative: str = setting("", "speculative decoding", available=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if not self.model:
            raise BadRequest("model: missing; give a Hugging Face id, or a folder with safetensors or GGUF weights")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise BadRequest(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is less than max_num_seqs "
                f"({self.max_num_seqs}); every running sequence needs one token a step"
            )
        self._check_adapters()
        self._check_otlp_endpoint()

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> EngineConfig:
        """Settings from strings. An empty string means the default. Raises ``BadRequest`` naming the key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, text in parameters.items():
            if key not in fields:
                raise BadRequest(f"unknown setting {key!r}; known settings: {', '.join(sorted(fields))}")
            if text.strip():
                values[key] = _parse(fields[key], text.strip())
        return cls(**values)

    def to_parameters(self) -> dict[str, str]:
        """The strings that ``from_parameters`` makes these settings of."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _text(value) for name, value in values.items()}

    @property
    def serves_adapters(self) -> bool:
        """Whether there must be room for adapters."""
        return bool(self.adapters or self.adapter_root or self.allow_hub_adapters or self.xlora)

    @property
    def num_adapter_slots(self) -> int:
        return self.max_loras if self.serves_adapters else 0

    def _check_adapters(self) -> None:
        try:
            parse_adapter_list(self.adapters)
        except ValueError as error:
            raise BadRequest(f"adapters: {error}; give name=path, name=path, ...") from None
        if self.max_cpu_loras < self.max_loras:
            raise BadRequest(
                f"max_cpu_loras: {self.max_cpu_loras} is less than max_loras ({self.max_loras}), which pass through "
                "host memory"
            )

    def _check_otlp_endpoint(self) -> None:
        parts = urlsplit(self.otlp_endpoint)
        if self.otlp_endpoint and not (parts.scheme in ("http", "https") and parts.hostname):
            raise BadRequest(
                f"otlp_endpoint: {self.otlp_endpoint!r} is not allowed; give a URL such as http://localhost:4318"
            )

    @property
    def limits(self) -> Limits:
        return Limits(
            max_n=self.max_n,
            max_stop_strings=self.max_stop_strings,
            max_logprobs=self.max_logprobs,
            max_prompt_bytes=self.max_prompt_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, with the secret left out."""
        return {**dataclasses.asdict(self), "admin_token": "set" if self.admin_token else ""}


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    kind = str(field.type).removesuffix(" | None")
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        raise BadRequest(f"{field.name}: {text!r} is not {allowed_values(field)}") from None
    if kind == "bool":
        if text.lower() not in _TRUE + _FALSE:
            raise BadRequest(f"{field.name}: {text!r} is not {allowed_values(field)}")
        return text.lower() in _TRUE
    return text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return _TRUE[0] if value else _FALSE[0]
    return "" if value is None else str(value)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise unless ``value`` has the field's type and lies within its limits."""
    if value == field.default and type(value) is type(field.default):
        return
    kind = str(field.type).removesuffix(" | None")
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise BadRequest(f"{field.name}: {value!r} is not {allowed_values(field)}")
    choices, low, high = field.metadata["choices"], field.metadata["minimum"], field.metadata["maximum"]
    out_of_range = isinstance(value, (int, float)) and (
        not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high)
    )
    if out_of_range or (choices is not None and str(value) not in choices):
        raise BadRequest(f"{field.name}: {value!r} is not {allowed_values(field)}")
    if not field.metadata["available"]:
        raise BadRequest(f"{field.name}: not available yet; leave it at its default ({field.default!r})")


def allowed_values(field: dataclasses.Field[Any]) -> str:
    """What a field accepts, in words: ``an integer from 1 to 8``."""
    if field.metadata["choices"] is not None:
        return "one of " + ", ".join(field.metadata["choices"])
    kind = str(field.type).removesuffix(" | None")
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}[kind]
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    return words if low is None else f"{words} of at least {low}"
