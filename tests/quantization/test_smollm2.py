"""Methods on real weights: the first layers of SmolLM2, with its norms folded so that weights are off GGUF's grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.fakes.tiny_decoders import CPU
from tests.quantization.tiny import DictReader
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.source import resolve_model
from trident_llm.models.weights import expected_shapes, open_weights
from trident_llm.quantization.calibration import CalibrationSettings, load_samples
from trident_llm.quantization.float_layer import LayerForward, read_layer
from trident_llm.quantization.installation import EMBEDDING
from trident_llm.quantization.modules import LAYER_MODULES, modules_of_layer
from trident_llm.quantization.scheme import QuantizationSettings, make_plan
from trident_llm.quantization.walk import Walk
from trident_llm.text import Tokenizer

NUM_LAYERS = 2
READ_BY = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}


class Cut:
    """Two layers, and samples of the text that ships: some to calibrate on, some to measure."""

    def __init__(self, gguf: Path, tokenizer_folder: Path) -> None:
        source = resolve_model(str(gguf))
        whole = read_model_config(source)
        self.config: ModelConfig = replace(whole, num_hidden_layers=NUM_LAYERS)
        reader = open_weights(source, whole, dtype=torch.float32, device="cpu")
        tensors = {name: reader.read(name).clone() for name in expected_shapes(self.config)}
        for name, norm in [item for item in tensors.items() if item[0].endswith("layernorm.weight")]:
            prefix, kind = name.removesuffix(".weight").rsplit(".", 1)
            block = "mlp" if kind == "post_attention_layernorm" else "self_attn"
            for part in READ_BY[kind]:
                tensors[f"{prefix}.{block}.{part}.weight"] *= norm
            tensors[name] = torch.ones_like(norm)
        self.reader = DictReader(tensors)
        samples = load_samples(
            CalibrationSettings("", 16, 256),
            Tokenizer(tokenizer_folder),
            vocab_size=whole.vocab_size,
            max_length=2048,
            held_out=True,
        )
        self.samples, self.held_out = samples.calibration, samples.held_out
        self.expected = self.outputs({})

    def outputs(self, parameters: dict[str, Tensor | QuantizedWeight]) -> Tensor:
        """What the layers make of the held-out samples, in float32."""
        forward = LayerForward(
            self.config, length=self.held_out.shape[1], max_model_len=2048, dtype=torch.float32, device=CPU
        )
        hidden = torch.nn.functional.embedding(self.held_out, self.reader.read(EMBEDDING))
        for index in range(NUM_LAYERS):
            layer = read_layer(self.reader, self.config, index)
            prefix = f"model.layers.{index}."
            layer.input_norm = parameters.get(f"{prefix}input_layernorm.weight", layer.input_norm)
            name = f"{prefix}post_attention_layernorm.weight"
            layer.post_attention_norm = parameters.get(name, layer.post_attention_norm)
            for key, module in zip(LAYER_MODULES, modules_of_layer(self.config, index), strict=True):
                weight = parameters.get(f"{module.name}.weight")
                if weight is not None:
                    layer.weights[key] = weight.dequantize()
            hidden = forward(layer, hidden, layer.product)
        return hidden

    def error(self, method: str, bits: int | None = None) -> float:
        """Relative, of the last layer's output."""
        walk = Walk(
            self.reader,
            self.config,
            make_plan(QuantizationSettings(method, bits, layers="lm_head=none"), self.config),
            max_model_len=2048,
            embedding=self.reader.read(EMBEDDING),
            samples=self.samples,
            progress=lambda text: None,
        )
        changed = self.outputs(dict(walk.parameters()))
        # The first token of a sequence has outputs a hundred times as large as all others; it is left out.
        return float((changed - self.expected)[:, 1:].norm() / self.expected[:, 1:].norm())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Methods work on pieces that fit a core's cache; where cores are taken by others, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cut(smollm2_gguf: Path, smollm2_folder: Path) -> Cut:
    with torch.no_grad():
        return Cut(smollm2_gguf, smollm2_folder)


def test_methods_that_look_at_inputs_are_nearer_than_rounding(cut):
    """Squared errors are what a model's loss grows with."""
    rtn, awq, gptq = (cut.error(method, 4) ** 2 for method in ("rtn", "awq", "gptq"))
    assert awq < 0.75 * rtn
    assert gptq < 0.65 * rtn
    assert rtn > 0.005


def test_more_bits_are_nearer(cut):
    errors = [cut.error("gptq", bits) for bits in (5, 6, 8)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.4 * errors[1]


def test_eight_bits_with_activations(cut):
    assert cut.error("smoothquant") < 0.1 and cut.error("fp8") < 0.1
