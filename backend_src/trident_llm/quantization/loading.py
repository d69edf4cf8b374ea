"""Quantization as a step of loading: settings checked early, then weights walked into a decoder, or taken from disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import EngineConfig
from ..errors import BadRequest
from ..models.llama import LlamaDecoder
from ..models.model_config import ModelConfig
from ..models.weights import WeightReader
from ..text import Tokenizer
from .cache import CachedParameters, cache_key, cache_root, open_cache
from .calibration import CalibrationSettings, Samples, cut_samples, load_samples
from .installation import EMBEDDING, Installer
from .methods import needs_calibration
from .peak_memory import PeakMemory
from .run import QuantizationRun
from .scheme import NONE, QuantizationSettings, average_bits, make_plan, pinned_modules

Progress = Callable[[str], None]

_FP8_CAPABILITY = (8, 9)
"""The first with matrix instructions for fp8."""


@dataclass(frozen=True)
class QuantizationReport:
    """What was done, for statistics and logs."""

    layers: dict[str, str]
    """Scheme and error of each linear layer."""
    average_bits: float
    """Of the decoder layers' weights, scales and zero points included."""
    seconds: float
    peak_bytes: int
    """Memory in use beyond what was in use before, at most."""
    held_out_loss: float | None = None
    """Perplexity's relative increase on held-out text; None where no bound was given."""
    from_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """A line for the log."""
        loss = "" if self.held_out_loss is None else f", {100 * self.held_out_loss:.2f}% loss on held-out text"
        return (
            f"{'read from disk' if self.from_cache else 'quantized'} in {self.seconds:.1f} s: {self.average_bits:.2f} "
            f"bits a weight{loss}; {self.peak_bytes / 2**20:,.0f} MiB in use at most"
        )


def _check_fp8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise BadRequest(
            f"isq_method: fp8 needs a GPU of compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or later; "
            "allowed here: rtn, awq, gptq, smoothquant, none"
        )


class Quantization:
    """The settings ``isq_*`` for one model on one device. Raises ``BadRequest`` when they do not fit."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, device: torch.device) -> None:
        settings = QuantizationSettings(config.isq_method, config.isq_bits, config.isq_group_size, config.isq_layers)
        self.enabled = settings.enabled
        if settings.enabled and model_config.quantization is not None:
            key, value = ("isq_layers", settings.layers) if settings.method == NONE else ("isq_method", settings.method)
            raise BadRequest(
                f"{key}: {value}, but the model's weights are quantized already ({model_config.quantization.layout}); "
                "leave isq_* at their defaults, or load the full-precision model"
            )
        self._max_loss = config.isq_max_loss
        self._caches = config.isq_cache
        if self._max_loss and (settings.method == NONE or settings.bits is not None):
            raise BadRequest(
                f"isq_max_loss: {self._max_loss:g} chooses bits for the layers of isq_method; "
                "set isq_method, and leave isq_bits empty"
            )
        self._plan = make_plan(settings, model_config)
        if any(scheme is not None and scheme.method == "fp8" for scheme in self._plan.values()):
            _check_fp8(device)
        self._pinned = pinned_modules(settings, model_config)
        self._calibration = CalibrationSettings(
            config.isq_calibration, config.isq_calibration_samples, config.isq_calibration_length
        )
        self._model_config = model_config
        self._samples: Samples | None = None
        self._kept: CachedParameters | None = None
        """What ``find_kept`` has found."""
        self.samples_digest = ""
        """Of the calibration text; empty without one."""

    @property
    def needs_calibration(self) -> bool:
        return bool(self._max_loss) or any(map(needs_calibration, self._plan.values()))

    def read_calibration(self, tokenizer_folder: Path, max_model_len: int) -> None:
        """Raises ``BadRequest`` for an unusable calibration file, whether or not a method needs it."""
        if self.enabled and (self._calibration.file or self.needs_calibration):
            self._samples = load_samples(
                self._calibration,
                Tokenizer(tokenizer_folder),
                vocab_size=self._model_config.vocab_size,
                max_length=max_model_len,
                held_out=bool(self._max_loss),
            )
            self.samples_digest = self._samples.digest

    def calibrate_on(self, token_ids: Sequence[int], what: str, max_model_len: int) -> None:
        """Take these in place of the file's text. Raises ``BadRequest`` that begins with ``what`` for too few."""
        self._samples = cut_samples(
            token_ids, self._calibration, what, max_length=max_model_len, held_out=bool(self._max_loss)
        )
        self.samples_digest = self._samples.digest

    def find_kept(self, samples_digest: str, dtype: torch.dtype, weights_identity: str, progress: Progress) -> bool:
        """Whether the disk has what was made on samples of this digest; then ``load`` needs no text."""
        if not (self.enabled and self._caches):
            return False
        self.samples_digest = samples_digest
        self._kept = open_cache(self.cache_folder(dtype, weights_identity), progress)
        if self._kept is None:
            self.samples_digest = ""
        return self._kept is not None

    @torch.no_grad()
    def load(
        self, decoder: LlamaDecoder, reader: WeightReader, weights_identity: str, progress: Progress
    ) -> QuantizationReport:
        """Fill ``decoder`` with quantized weights. weights_identity: a text that no other weights have."""
        began, peak = time.monotonic(), PeakMemory(decoder.device)
        folder = self.cache_folder(decoder.dtype, weights_identity) if self._caches else None
        cached = self._kept
        if cached is None and folder is not None:
            cached = open_cache(folder, progress)
        if cached is not None:
            installer = Installer(decoder)
            installer.install(EMBEDDING, reader.read(EMBEDDING).clone())
            installer.install_all(cached.parameters(decoder.device))
            installer.install_rest(reader)
            found = cached.report
        else:
            run = QuantizationRun(decoder, reader, self._samples, folder, progress)
            with contextlib.closing(run):
                found = self._quantize(run)
                run.keep(found)
        report = QuantizationReport(
            **found, seconds=time.monotonic() - began, peak_bytes=peak.bytes(), from_cache=cached is not None
        )
        progress(report.summary())
        return report

    def _quantize(self, run: QuantizationRun) -> dict[str, Any]:
        """The parts of a report that a cache keeps."""
        plan, loss = self._plan, None
        if self._max_loss:
            plan, loss = run.search(plan, self._pinned, self._max_loss)
        else:
            run.quantize(plan)
        return {
            "layers": {result.name: f"{result.scheme}, error {result.error:.4f}" for result in run.results},
            "average_bits": average_bits(plan, self._model_config),
            "held_out_loss": loss,
        }

    def cache_folder(self, dtype: torch.dtype, weights_identity: str) -> Path:
        """Where ``load`` keeps what it made of these weights."""
        parts = {
            "weights": weights_identity,
            "model": self._model_config,
            "dtype": dtype,
            "plan": list(self._plan.items()),
            "pinned": sorted(self._pinned),
            "max_loss": self._max_loss,
            "samples": self.samples_digest,
        }
        return cache_root() / cache_key(parts)
