"""One quantization of a model from its weights: walks that fill the decoder, and the search for bits around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..models.llama import LlamaDecoder
from ..models.weights import WeightReader
from .bit_choice import choose_bits, lowest_bits
from .cache import CacheWriter
from .calibration import Samples
from .installation import EMBEDDING, Installer
from .methods import needs_calibration
from .scheme import Plan
from .search import search_plan
from .sensitivity import Sensitivity
from .walk import QuantizedLinear, Walk

Progress = Callable[[str], None]

SENSITIVITY_SAMPLES = 16
_OTHER_TEXT = 1.35
"""What calibrated weights lose on text of another kind, in units of what they lose on held-out text. SmolLM2 on the
prose and code of load_tests/data: 1.27 (AWQ) and 1.32 (GPTQ); RTN, which reads no text, 1.05."""


class QuantizationRun:
    """Quantizes into ``decoder``; what was done last counts, and is kept in ``folder`` if there is one."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        reader: WeightReader,
        samples: Samples | None,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self._decoder = decoder
        self._reader = reader
        self._samples = samples
        self._folder = folder
        self._progress = progress
        self._embedding = reader.read(EMBEDDING).clone()
        self._writer: CacheWriter | None = None
        self.results: list[QuantizedLinear] = []

    def quantize(self, plan: Plan) -> float | None:
        """Fill the decoder by ``plan``. Returns the loss of held-out text in nats a token, where there is some."""
        installer, walk = Installer(self._decoder), self._walk(plan)
        installer.install(EMBEDDING, self._embedding)
        if self._folder is not None:
            self._write(functools.partial(self._open_writer, self._folder))
        for name, value in walk.parameters():
            installer.install(name, value)
            if self._writer is not None:
                self._write(functools.partial(self._writer.add, name, value))
        installer.install_rest(self._reader)
        self.results = walk.results
        return walk.held_out_loss

    def search(self, plan: Plan, pinned: frozenset[str], max_loss: float) -> tuple[Plan, float]:
        """Fill the decoder by the plan of least memory whose loss is at most ``max_loss``.

        Measured on held-out text and, for methods that calibrate, scaled to what other text loses. Layers that are not
        ``pinned`` get other bits than those of ``plan``. Returns the plan and its loss on held-out text.
        Raises ``BadRequest`` when there is none.
        """
        assert self._samples is not None
        config = self._decoder.config
        base = self._loss_in_full_precision(plan)
        tried = {name: None if name in pinned else lowest_bits(scheme) for name, scheme in plan.items()}
        calibration = self._samples.calibration
        sensitivity = Sensitivity(
            self._reader,
            config,
            max_model_len=self._decoder.max_model_len,
            embedding=self._embedding,
            samples=calibration[:: max(calibration.shape[0] // SENSITIVITY_SAMPLES, 1)],
            progress=self._progress,
        )
        costs = sensitivity.measure(tried)
        factor = _OTHER_TEXT if any(map(needs_calibration, plan.values())) else 1.0

        def choose(budget: float) -> Plan:
            chosen = choose_bits(tried, costs, config, budget)
            return {name: plan[name] if name in pinned else scheme for name, scheme in chosen.items()}

        def measure(chosen: Plan) -> float:
            loss = self.quantize(chosen)
            assert loss is not None
            self._progress(f"held-out text costs {loss - base:.4f} nats a token more than in full precision")
            return (loss - base) * factor

        trial = search_plan(max_loss, choose, measure)
        return trial.plan, math.expm1(math.log1p(trial.loss) / factor)

    def keep(self, report: Mapping[str, Any]) -> None:
        """Make what was done last the content of the folder."""
        if self._writer is not None:
            self._write(functools.partial(self._writer.finish, report))

    def _loss_in_full_precision(self, plan: Plan) -> float:
        self._progress("measuring the loss of held-out text in full precision")
        walk = self._walk(dict.fromkeys(plan), progress=lambda text: None)
        changed = list(walk.parameters())
        assert not changed and walk.held_out_loss is not None
        return walk.held_out_loss

    def _walk(self, plan: Plan, progress: Progress | None = None) -> Walk:
        samples = self._samples
        return Walk(
            self._reader,
            self._decoder.config,
            plan,
            max_model_len=self._decoder.max_model_len,
            embedding=self._embedding,
            samples=None if samples is None else samples.calibration,
            held_out=samples.held_out if samples is not None and len(samples.held_out) else None,
            progress=progress or self._progress,
        )

    def _open_writer(self, folder: Path) -> None:
        self.close()
        self._writer = CacheWriter(folder)

    def close(self) -> None:
        """Remove from disk what was not kept."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.discard()

    def _write(self, action: Callable[[], None]) -> None:
        """Without room on disk the next start quantizes again; that is no reason not to serve."""
        try:
            action()
        except OSError as error:
            self.close()
            self._progress(f"quantized weights are not kept on disk: {error}")
