"""TinyDecoder: a random transformers model in memory, as the oracle, beside our decoder with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tests.fakes.paged_steps import Chunk, PagedSteps
from trident_llm.engine.kv_cache import KVCache
from trident_llm.models.llama import LlamaDecoder
from trident_llm.models.model_config import ModelConfig

CPU = torch.device("cpu")
VOCAB, MAX_LEN = 131, 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": MAX_LEN,
}


@dataclass(frozen=True)
class TinyDecoder:
    oracle: Any
    decoder: LlamaDecoder
    config: ModelConfig

    def expected(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits [len(token_ids), vocab]."""
        with torch.inference_mode():
            return self.oracle(torch.tensor([token_ids])).logits[0].float()

    def run(self, steps: PagedSteps, token_ids: list[list[int]], schedule: list[list[Chunk]]) -> list[torch.Tensor]:
        """Run the steps on one KV cache; the logits of each sequence's tokens [len(token_ids[i]), vocab]."""
        cache = KVCache(
            self.config,
            num_blocks=steps.num_blocks,
            block_size=steps.block_size,
            dtype=self.decoder.dtype,
            device=CPU,
        )
        logits = [torch.full((len(ids), self.config.vocab_size), float("nan")) for ids in token_ids]
        for chunks in schedule:
            rows = self.decoder.forward(steps.model_input(token_ids, chunks), cache)
            for chunk, part in zip(chunks, rows.split([c.num_tokens for c in chunks]), strict=True):
                logits[chunk.seq][chunk.start : chunk.start + chunk.num_tokens] = part
        return logits


def make_tiny(
    architecture: str,
    config: dict[str, Any] | None = None,
    expect: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = MAX_LEN,
) -> TinyDecoder:
    """``config`` goes to transformers' config; ``expect`` is what ModelConfig says about the same model."""
    name = f"{architecture}ForCausalLM"
    model_class = getattr(transformers, name)
    oracle = model_class(model_class.config_class(**{**SIZES, **(config or {})})).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in oracle.named_parameters():
        mean, std = (1.0, 0.1) if parameter_name.endswith("norm.weight") else (0.0, 0.15)
        parameter.data = (mean + std * torch.randn(parameter.shape, generator=generator)).to(dtype)
    own = ModelConfig(**{**SIZES, "architecture": name, "rope_theta": 10000.0, **(expect or {})})
    decoder = LlamaDecoder(own, dtype=dtype, device=CPU, max_model_len=max_model_len)
    decoder.load_weights(parameters_of(oracle, own).items())
    return TinyDecoder(oracle, decoder, own)


def parameters_of(oracle: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every parameter once: the copy of a tied embedding under lm_head.weight is left out."""
    items = oracle.state_dict().items()
    return {name: t for name, t in items if not (config.tie_word_embeddings and name == "lm_head.weight")}
