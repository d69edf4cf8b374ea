"""How long quantizing a model while it loads takes, and what memory; results to load_tests/results/quantize.jsonl.

    python load_tests/bench_quantize.py                                                   the bundled SmolLM2-135M
    python load_tests/bench_quantize.py --model load_tests/models/mistral-7b --name mistral-7b --set load_format=dummy

cold_seconds       from weights in full precision, calibration included, to packed ones
cpu_seconds        of that, of all threads, where the device is the CPU
cached_seconds     the second start, from the disk cache
peak_mib           memory in use beyond what was in use before, at most, while it quantized
weights_percent    all weights as they lie on the device, of those in full precision
average_bits       of a weight of the decoder layers, scales and zero points included
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from engine_arguments import add_settings, engine_settings
from results_file import RESULTS, ResultsFile

from trident_llm import EngineConfig
from trident_llm.engine.loading import LoadedModel, load_model
from trident_llm.launch.default_model import default_model

VARIANTS = {
    "rtn-4": {"isq_method": "rtn"},
    "rtn-8": {"isq_method": "rtn", "isq_bits": "8"},
    "awq-4": {"isq_method": "awq"},
    "gptq-4": {"isq_method": "gptq"},
    "smoothquant": {"isq_method": "smoothquant"},
    "fp8": {"isq_method": "fp8"},
    "gptq-loss": {"isq_method": "gptq", "isq_max_loss": "0.05"},
}


def load(model: str, settings: dict[str, str]) -> LoadedModel:
    return load_model(EngineConfig.from_parameters({"model": model, "max_num_blocks": "256", **settings}), print)


def measure(args: argparse.Namespace, variant: str) -> None:
    settings = {"max_model_len": "2048", **VARIANTS[variant], **engine_settings(args)}
    file = ResultsFile(
        path=args.out, benchmark="bench_quantize", model=args.name, variant=variant, settings=settings
    )
    began = time.process_time()
    cold = load(args.model, settings)
    seconds = time.process_time() - began
    report = cold.quantization
    assert report is not None and not report.from_cache
    file.record("load", "cold_seconds", [report.seconds])
    if cold.device.type == "cpu":
        file.record("load", "cpu_seconds", [seconds])
    file.record("load", "peak_mib", [report.peak_bytes / 2**20])
    file.record("load", "weights_percent", [100 * cold.weights_bytes_after / cold.weights_bytes_before])
    file.record("load", "average_bits", [report.average_bits])
    del cold
    cached = load(args.model, settings).quantization
    assert cached is not None and cached.from_cache
    file.record("load", "cached_seconds", [cached.seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the bundled SmolLM2-135M")
    parser.add_argument("--name", default="smollm2-135m", help="the model's name in the results")
    add_settings(parser)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.jsonl")
    args = parser.parse_args()
    args.model = args.model or str(default_model())
    unknown = set(args.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"--variants: {', '.join(sorted(unknown))}; allowed: {', '.join(VARIANTS)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for variant in args.variants.split(","):
            measure(args, variant)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
