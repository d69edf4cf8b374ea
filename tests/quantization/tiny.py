"""A tiny random model of each family as a WeightReader, and walks over it without serving kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fakes.tiny_decoders import CPU, MAX_LEN, VOCAB, make_tiny, parameters_of
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.models.llama import LlamaDecoder
from trident_llm.models.model_config import ModelConfig
from trident_llm.quantization.installation import EMBEDDING, HEAD_WEIGHT, Installer, Parameter
from trident_llm.quantization.modules import model_modules
from trident_llm.quantization.scheme import QuantizationSettings, make_plan
from trident_llm.quantization.walk import Walk

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
}
FAMILIES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "llama-biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 11}, {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}, {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}, {"head_dim": 32, "qk_norm": True}),
}


class DictReader:
    """A ``WeightReader`` of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


@dataclass(frozen=True)
class TinyModel:
    oracle: Any
    config: ModelConfig
    reader: DictReader

    def walk(self, samples: Tensor | None = None, progress: Any = None, **settings: Any) -> Walk:
        return Walk(
            self.reader,
            self.config,
            make_plan(QuantizationSettings(**settings), self.config),
            max_model_len=MAX_LEN,
            embedding=self.reader.read(EMBEDDING),
            samples=samples,
            progress=progress or (lambda text: None),
        )

    def decoder_of(self, parameters: dict[str, Parameter]) -> LlamaDecoder:
        """A decoder whose quantized weights have been turned back into float32."""
        decoder = LlamaDecoder(self.config, dtype=torch.float32, device=CPU, max_model_len=MAX_LEN)
        installer = Installer(decoder)
        installer.install(EMBEDDING, self.reader.read(EMBEDDING))
        for name, value in parameters.items():
            installer.install(name, value.dequantize() if isinstance(value, QuantizedWeight) else value)
        installer.install_rest(self.reader)
        return decoder


def tiny_model(family: str = "llama") -> TinyModel:
    architecture, config, expect = FAMILIES[family]
    tiny = make_tiny(architecture, {**SIZES, **config}, {**SIZES, **expect})
    return TinyModel(tiny.oracle, tiny.config, DictReader(parameters_of(tiny.oracle, tiny.config)))


def scaled_parameters(model: TinyModel, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """What a walk made, but for the rounding: weights of the checkpoint, with the scales that were folded."""
    scaled = dict(parameters)
    for module in model_modules(model.config)[:-1]:
        weight = torch.cat([model.reader.read(f"{part}.weight") for part in module.parts])
        outputs = parameters.get(f"{module.name}.output_scales", torch.ones(module.num_outputs))
        scaled[f"{module.name}.weight"] = weight * parameters[f"{module.name}.input_scales"] / outputs[:, None]
    scaled.pop(HEAD_WEIGHT)
    return scaled


def token_samples(num: int = 6, length: int = 40) -> Tensor:
    return torch.randint(0, VOCAB, (num, length), generator=torch.Generator().manual_seed(3))
