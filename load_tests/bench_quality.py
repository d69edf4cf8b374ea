"""What quantization costs in quality; results to load_tests/results/quality.jsonl, then what must be and whether it is.

    python load_tests/bench_quality.py                                        on the bundled SmolLM2-135M
    python load_tests/bench_quality.py --variants all --resume                all curves, without what is there already
    python load_tests/bench_quality.py --model mistralai/Mistral-7B-v0.1 --name mistral-7b --device cuda

Every variant is a model that the engine loads with these settings alone and computes with the kernels it serves with.
The texts (load_tests/data) are no part of the calibration text. A GGUF file is folded first (folded_model.py). The
reference is the same model in the engine's dtype without quantization.

perplexity         of every token but a sequence's first
loss_percent       how much larger the perplexity is than the reference's
kl_millinats       mean KL divergence of the reference's distributions from the variant's, in thousandths of a nat
same_top_percent   positions whose most likely token is the reference's
average_bits       of a weight of the decoder layers, scales and zero points included
weights_mib        all weights as the engine holds them, embedding and head included
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from divergence import Comparison, Reference, compare, perplexity, refer
from engine_arguments import add_settings, engine_settings
from folded_model import unfolded_or_folded
from quality_results import BOTH, read_measured
from quality_texts import KINDS, num_sequences, text_sequences
from quality_variants import VARIANTS, chosen_variants
from quality_verdict import AVERAGE_BITS, LOSS, is_valid, verdicts
from results_file import RESULTS, ResultsFile, device_name
from teacher_forced import Chunk, TeacherForced
from torch import Tensor

from trident_llm import EngineConfig
from trident_llm.engine.loading import LoadedModel, load_model
from trident_llm.launch.default_model import default_model
from trident_llm.models.model_config import ModelConfig
from trident_llm.quantization.modules import model_modules
from trident_llm.text import Tokenizer

REFERENCE = "reference"
_CHUNK = 512
_LAST_METRIC = "weights_mib"
_WORK = Path.home() / ".cache" / "trident" / "folded"


@dataclass(frozen=True)
class Bench:
    """One model and where its results go."""

    args: argparse.Namespace
    model: str
    settings: Mapping[str, str]
    """Of every variant."""

    def run(self, variants: list[str]) -> None:
        """Measure the reference and those variants that are still to be measured."""
        if self.args.resume:
            variants = [variant for variant in variants if not self._is_done(variant)]
        if not variants:
            return
        model = self._load({})
        tokenizer = Tokenizer(model.tokenizer_folder)
        most = num_sequences(self.args.tokens, self.args.length)
        texts = {kind: text_sequences(tokenizer, kind, self.args.length, most) for kind in KINDS}
        with torch.inference_mode():
            references = {kind: refer(self._chunks(model, texts[kind]), model.decoder.head) for kind in KINDS}
        file = self._file(REFERENCE, {})
        for kind, logprobs in _with_both({kind: found.logprobs for kind, found in references.items()}).items():
            file.record(kind, "perplexity", [perplexity(logprobs)])
        _record_memory(file, model)
        fitting = [variant for variant in variants if _fits(variant, model.config)]
        for variant in fitting:
            del model
            model = self._load(VARIANTS[variant])
            with torch.inference_mode():
                found = {kind: compare(references[kind], self._chunks(model, texts[kind])) for kind in KINDS}
            file = self._file(variant, VARIANTS[variant])
            _record_quality(file, found, references)
            _record_memory(file, model)

    def _load(self, settings: Mapping[str, str]) -> LoadedModel:
        # Cached weights may come from other code than is measured.
        fixed = {"isq_cache": "false", "max_model_len": str(self.args.length), "max_num_seqs": "1", "model": self.model}
        return load_model(EngineConfig.from_parameters({**self.settings, **settings, **fixed}), print)

    def _chunks(self, model: LoadedModel, sequences: list[list[int]]) -> Iterator[Chunk]:
        forced = TeacherForced(model, "auto", self.args.length, _CHUNK)
        for tokens in sequences:
            yield from forced.chunks(tokens)

    def _file(self, variant: str, settings: Mapping[str, str]) -> ResultsFile:
        texts = {"length": self.args.length, "tokens": self.args.tokens or "all"}
        return ResultsFile(
            path=self.args.out,
            benchmark="bench_quality",
            model=self.args.name,
            variant=variant,
            settings={**self.settings, **settings, **texts},
        )

    def _is_done(self, variant: str) -> bool:
        """Whether the results file has all of this variant with the same settings on this device."""
        wanted = (variant, self.args.name, device_name(), dict(self._file(variant, VARIANTS[variant]).settings))
        lines = map(json.loads, self.args.out.read_text().splitlines()) if self.args.out.exists() else ()
        done = [line for line in lines if line["metric"] == _LAST_METRIC]
        return any((line["variant"], line["model"], line["device"], line["settings"]) == wanted for line in done)


def _fits(variant: str, config: ModelConfig) -> bool:
    """Whether the variant's groups divide the inputs of every layer."""
    size = VARIANTS[variant].get("isq_group_size", "auto")
    return not size.isdecimal() or all(module.num_inputs % int(size) == 0 for module in model_modules(config))


def _record_quality(
    file: ResultsFile, found: Mapping[str, Comparison], references: Mapping[str, Reference]
) -> None:
    expected = _with_both({kind: reference.logprobs for kind, reference in references.items()})
    logprobs = _with_both({kind: comparison.logprobs for kind, comparison in found.items()})
    divergence = _with_both({kind: comparison.divergence for kind, comparison in found.items()})
    same_top = _with_both({kind: comparison.same_top for kind, comparison in found.items()})
    for kind in logprobs:
        loss = perplexity(logprobs[kind]) / perplexity(expected[kind]) - 1
        file.record(kind, "perplexity", [perplexity(logprobs[kind])])
        file.record(kind, LOSS, [100 * loss])
        file.record(kind, "kl_millinats", [1000 * divergence[kind].double().mean().item()])
        file.record(kind, "same_top_percent", [100 * same_top[kind].double().mean().item()])


def _record_memory(file: ResultsFile, model: LoadedModel) -> None:
    bits = 8 * model.dtype.itemsize if model.quantization is None else model.quantization.average_bits
    file.record(BOTH, AVERAGE_BITS, [bits])
    file.record(BOTH, _LAST_METRIC, [model.weights_bytes_after / 2**20])


def _with_both(by_kind: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kinds, and all of their positions together."""
    return {**by_kind, BOTH: torch.cat(list(by_kind.values()))}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the bundled SmolLM2-135M")
    parser.add_argument("--name", default="smollm2-135m", help="the model's name in the results")
    parser.add_argument("--variants", default="essential", help="essential, all, or names with commas between")
    parser.add_argument("--tokens", type=int, default=0, help="about so many of each text; 0: all, 53,000 and 57,000")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--device", default="auto", help="the engine's setting")
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="leave out what the results file has already")
    parser.add_argument("--work", type=Path, default=_WORK, help="folder for folded models")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.jsonl")
    args = parser.parse_args()
    try:
        args.variants = chosen_variants(args.variants)
    except ValueError as error:
        parser.error(f"--variants: {error}")
    return args


def main() -> int:
    args = _parse()
    settings = {"device": args.device, **engine_settings(args)}
    Bench(args, unfolded_or_folded(args.model or default_model(), args.work), settings).run(args.variants)
    measured = read_measured(args.out, args.name, device_name())
    if not is_valid(measured):
        print(f"INVALID  rtn-4 loses {measured['rtn-4'][LOSS]:.2f}%: these weights lie on a 4-bit grid already")
        return 1
    found = verdicts(measured)
    print(*found, sep="\n")
    return 0 if all(verdict.passed for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main())
