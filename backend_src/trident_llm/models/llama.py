"""The Llama family of decoders: Llama, Mistral, Qwen2, Qwen3 and what shares their shape (SmolLM).

Knows tensors and the paged cache; neither files, nor sampling, nor scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.batch import ModelInput
from ..engine.kv_cache import KVCache
from ..kernels import kernels_for
from ..kernels.layer_cache import LayerCache
from ..kernels.lora_layer import LoraRows
from ..kernels.quantized_rows import Rows
from ..kernels.quantized_weight import QuantizedWeight
from .layers import AdaptableLinear, Linear, WeightTarget, load_targets
from .model_config import ModelConfig
from .rotary import RotaryEmbedding, RotaryRows


class DecoderLayer:
    """The weights of one layer."""

    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def __init__(self, new_linear: Callable[[], Linear]) -> None:
        self.qkv = new_linear()
        self.o = new_linear()
        self.gate_up = new_linear()
        self.down = new_linear()


@dataclass(frozen=True)
class _Step:
    """What all layers of a step share."""

    rotary: RotaryRows
    plan: Any
    adapters: LoraRows | None


class LlamaDecoder:
    """Token ids and a paged KV cache in, logits out.

    Raises ``BadRequest`` when the model's rotary embedding is not supported. Weights come with ``load_weights``.
    """

    embedding: Tensor
    final_norm: Tensor

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, max_model_len: int
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.max_model_len = max_model_len
        self._kernels = kernels_for(device)
        self._rotary = RotaryEmbedding(config, max_model_len=max_model_len, dtype=dtype, device=device)
        self._scale = config.head_dim**-0.5
        self.layers = [DecoderLayer(self._new_linear) for _ in range(config.num_hidden_layers)]
        self.head = self._new_linear()

    @torch.inference_mode()
    def forward(self, model_input: ModelInput, kv_cache: KVCache, out: Tensor | None = None) -> Tensor:
        """Compute a step's tokens, write their K and V to the cache; logits [R, vocab] float32 of ``logits_rows``.

        out: where to write the logits, if not to new memory.
        """
        logits = self.head(self.hidden_states(model_input, kv_cache))
        return logits.float() if out is None else out.copy_(logits)

    def hidden_states(self, model_input: ModelInput, kv_cache: KVCache) -> Tensor:
        """What the head reads: the last layer's output of ``logits_rows`` after the final norm, [R, hidden].

        The last layer computes K and V of all tokens, but the rest of it only for these rows: 2.7% of the work of a
        prompt on Mistral-7B.
        """
        kernels, eps = self._kernels, self.config.rms_norm_eps
        step = _Step(
            rotary=self._rotary.rows(model_input.positions),
            plan=kernels.plan_attention(
                model_input.attention, dtype=self.dtype, sliding_window=self.config.sliding_window
            ),
            adapters=model_input.adapters.tokens if model_input.adapters else None,
        )
        residual = F.embedding(model_input.token_ids, self.embedding)
        x: Rows = kernels.rms_norm(residual, self.layers[0].input_norm, eps)
        following = [(layer.input_norm, layer.qkv) for layer in self.layers[1:]] + [(self.final_norm, None)]
        adapters = step.adapters
        for layer, layer_cache, (next_norm, reader) in zip(self.layers, kv_cache.layers, following, strict=True):
            attended = self._attention(layer, x, layer_cache, step)
            if layer is self.layers[-1]:
                attended = attended.index_select(0, model_input.logits_rows)
                residual = residual.index_select(0, model_input.logits_rows)
                adapters = model_input.adapters.rows if model_input.adapters else None
            x = layer.o.add_rms_norm(attended, residual, layer.post_attention_norm, eps, layer.gate_up, adapters)
            activated = layer.gate_up.silu_and_mul(x, layer.down, adapters)
            x = layer.down.add_rms_norm(activated, residual, next_norm, eps, reader, adapters)
        assert isinstance(x, Tensor)
        return x

    def _attention(self, layer: DecoderLayer, x: Rows, layer_cache: LayerCache, step: _Step) -> Tensor:
        """x [T, hidden] -> attention's output before its projection, [T, Hq * D]."""
        config, kernels = self.config, self._kernels
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = layer.qkv(x, step.adapters).view(-1, num_heads + 2 * num_kv_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, _ = qkv.split((num_heads, num_kv_heads, num_kv_heads), 1)
            q.copy_(kernels.rms_norm(q, layer.q_norm, config.rms_norm_eps))
            k.copy_(kernels.rms_norm(k, layer.k_norm, config.rms_norm_eps))
        kernels.rotary_embed_and_store_kv(qkv, step.rotary.cos, step.rotary.sin, layer_cache, step.plan)
        return kernels.paged_attention(qkv[:, :num_heads], layer_cache, step.plan, self._scale)

    @torch.inference_mode()
    def load_weights(self, weights: Iterable[tuple[str, Tensor | QuantizedWeight]]) -> None:
        """Take every parameter once, in any order, named as Hugging Face names it (no lm_head.weight when tied).

        q, k and v become one matrix, and so do gate and up. Raises ``LoadFailed`` for a tensor that is missing,
        unknown or misshapen.
        """
        load_targets(self.weight_targets(), weights, dtype=self.dtype, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights as they lie on the device. What a tied head shares with the embedding counts once."""
        held = {id(part): part.nbytes for part in (self.embedding, self.final_norm, self.head.weight)}
        for layer in self.layers:
            for part in vars(layer).values():
                tensors = (part.weight, part.bias) if isinstance(part, Linear) else (part,)
                held.update((id(tensor), tensor.nbytes) for tensor in tensors if tensor is not None)
        return sum(held.values())

    def exchange_weights(self, other: LlamaDecoder) -> None:
        """Give all weights to ``other``, a decoder of the same model, and take its own; a second call undoes it.

        What adapters have put beside the linear layers stays where it is.
        """
        for (owner, name), (other_owner, _) in zip(self._held(), other._held(), strict=True):
            mine, theirs = getattr(owner, name), getattr(other_owner, name)
            setattr(owner, name, theirs)
            setattr(other_owner, name, mine)

    def release_weights(self) -> None:
        """Hold none any more: nothing can be computed until ``exchange_weights``."""
        for owner, name in self._held():
            setattr(owner, name, None)

    def weight_targets(self) -> Iterator[WeightTarget]:
        """Every parameter, in the order of the checkpoint's names that stand for it."""
        config = self.config
        vocabulary = (config.vocab_size, config.hidden_size)
        yield WeightTarget({"model.embed_tokens.weight": vocabulary}, self._set_embedding)
        yield WeightTarget({"model.norm.weight": (config.hidden_size,)}, _setter(self, "final_norm"))
        if not config.tie_word_embeddings:
            yield WeightTarget({"lm_head.weight": vocabulary}, self.head.set_weight)
        for index, layer in enumerate(self.layers):
            yield from _layer_targets(config, layer, f"model.layers.{index}.")

    def adaptable_linears(self) -> Iterator[AdaptableLinear]:
        """The layers that adapters may update, in the order of the computation."""
        for index, layer in enumerate(self.layers):
            for linear, prefix, out_features, in_features in _projections(self.config, layer, f"model.layers.{index}."):
                parts = {prefix + name: size for name, size in out_features.items()}
                yield AdaptableLinear(linear, parts, in_features)

    def _held(self) -> Iterator[tuple[object, str]]:
        """Owner and attribute of every weight."""
        yield self, "embedding"
        yield self, "final_norm"
        linears = [self.head]
        for layer in self.layers:
            yield from ((layer, name) for name in ("input_norm", "post_attention_norm", "q_norm", "k_norm"))
            linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
        for linear in linears:
            yield from ((linear, name) for name in Linear.WEIGHTS)

    def _set_embedding(self, embedding: Tensor) -> None:
        self.embedding = embedding
        if self.config.tie_word_embeddings:
            # Shared, unless the device's linear kernel packs weights: rows cannot be looked up in a packed matrix.
            self.head.set_weight(embedding)

    def _new_linear(self) -> Linear:
        return Linear(self._kernels)


def _layer_targets(config: ModelConfig, layer: DecoderLayer, prefix: str) -> Iterator[WeightTarget]:
    hidden, attention = config.hidden_size, prefix + "self_attn."
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias, config.mlp_bias)
    for projection, bias in zip(_projections(config, layer, prefix), biases, strict=True):
        yield from _linear_targets(*projection, bias=bias)
    yield WeightTarget({prefix + "input_layernorm.weight": (hidden,)}, _setter(layer, "input_norm"))
    yield WeightTarget({prefix + "post_attention_layernorm.weight": (hidden,)}, _setter(layer, "post_attention_norm"))
    if config.qk_norm:
        yield WeightTarget({attention + "q_norm.weight": (config.head_dim,)}, _setter(layer, "q_norm"))
        yield WeightTarget({attention + "k_norm.weight": (config.head_dim,)}, _setter(layer, "k_norm"))


def _projections(
    config: ModelConfig, layer: DecoderLayer, prefix: str
) -> tuple[tuple[Linear, str, dict[str, int], int], ...]:
    """The linear layers of a decoder layer: prefix and outputs of the checkpoint's modules, and number of inputs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return (
        (layer.qkv, attention, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, hidden),
        (layer.o, attention, {"o_proj": hidden}, q_size),
        (layer.gate_up, mlp, {"gate_proj": inner, "up_proj": inner}, hidden),
        (layer.down, mlp, {"down_proj": hidden}, inner),
    )


def _linear_targets(
    linear: Linear, prefix: str, out_features: dict[str, int], in_features: int, *, bias: bool
) -> Iterator[WeightTarget]:
    """The weight, and the bias if there is one, of projections merged in the order of ``out_features``."""
    weights = {f"{prefix}{name}.weight": (size, in_features) for name, size in out_features.items()}
    yield WeightTarget(weights, linear.set_weight)
    if bias:
        yield WeightTarget({f"{prefix}{name}.bias": (size,) for name, size in out_features.items()}, linear.set_bias)


def _setter(owner: object, attribute: str) -> Callable[[Tensor], None]:
    return lambda tensor: setattr(owner, attribute, tensor)
