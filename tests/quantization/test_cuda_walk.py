"""Walks on a GPU: in 8 bits the model hardly changes, as on a CPU, and costs of bits are the same."""

from __future__ import annotations

import pytest
import torch

from tests.quantization.test_walk import expected_logits, logits
from tests.quantization.tiny import DictReader, TinyModel, tiny_model, token_samples
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.quantization.installation import EMBEDDING
from trident_llm.quantization.scheme import QuantizationSettings, make_plan
from trident_llm.quantization.sensitivity import Sensitivity

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models() -> tuple[TinyModel, TinyModel]:
    on_cpu = tiny_model("llama-biases")
    tensors = {name: on_cpu.reader.read(name).cuda() for name in on_cpu.reader.shapes}
    return on_cpu, TinyModel(on_cpu.oracle, on_cpu.config, DictReader(tensors))


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "smoothquant", "fp8"])
def test_every_method_on_a_gpu(models, method):
    on_cpu, on_gpu = models
    tokens = token_samples(16)
    settings = {"bits": 8} if method in ("rtn", "awq", "gptq") else {}
    found = dict(on_gpu.walk(tokens, method=method, **settings).parameters())
    parameters = {}
    for name, value in found.items():
        tensor = value.dequantize() if isinstance(value, QuantizedWeight) else value
        assert tensor.is_cuda, name
        parameters[name] = tensor.cpu()
    sequence = tokens[0].tolist()
    expected, actual = expected_logits(on_cpu, sequence), logits(on_cpu, parameters, sequence)
    assert (actual - expected).norm() < (0.16 if method == "fp8" else 0.04) * expected.norm()


def test_costs_of_bits_on_a_gpu(models):
    measured = []
    for model in models:
        plan = make_plan(QuantizationSettings("rtn", layers="lm_head=none"), model.config)
        sensitivity = Sensitivity(
            model.reader,
            model.config,
            max_model_len=96,
            embedding=model.reader.read(EMBEDDING),
            samples=token_samples(16),
            progress=lambda text: None,
        )
        with torch.no_grad():
            measured.append(sensitivity.measure(plan))
    assert measured[1] == pytest.approx(measured[0], rel=0.1)
