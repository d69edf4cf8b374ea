"""Scales folded into norms, v and up, where rounding and head counts get in the way."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.quantization.tiny import tiny_model
from trident_llm.quantization.float_layer import FloatLayer, read_layer
from trident_llm.quantization.folding import fold_scales, share_scales


def scales_of(size: int) -> torch.Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(5)))


def test_weights_make_up_for_the_rounding_of_a_norm():
    """In bf16 a norm's weight is up to 0.4% off what was asked for; norm times weight must not be."""
    model = tiny_model()
    layer = read_layer(model.reader, model.config, 0)
    layer.input_norm = layer.input_norm.bfloat16()
    before = layer.input_norm.float() * layer.weights["qkv"]
    folded = fold_scales(layer, model.config, "qkv", scales_of(64))
    assert layer.input_norm.dtype == torch.bfloat16 and folded.source is None
    torch.testing.assert_close(layer.input_norm.float() * layer.weights["qkv"], before, rtol=1e-6, atol=1e-7)
    asked = scales_of(64)
    assert 1e-4 < (folded.inputs / asked - 1).abs().max() < 5e-3


def test_a_norm_weight_of_zero_stays_and_its_input_is_not_scaled():
    model = tiny_model()
    layer = read_layer(model.reader, model.config, 0)
    layer.post_attention_norm = layer.post_attention_norm.clone()
    layer.post_attention_norm[3] = 0
    folded = fold_scales(layer, model.config, "gate_up", scales_of(64))
    assert layer.post_attention_norm[3] == 0 and folded.inputs[3] == 1 and folded.inputs.isfinite().all()


def test_query_heads_of_a_kv_head_share_the_geometric_mean():
    config = replace(tiny_model().config, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    scales = scales_of(64)
    shared = share_scales(config, "o", scales).view(2, 2, 16)
    expected = (scales.view(2, 2, 16)[:, 0] * scales.view(2, 2, 16)[:, 1]).sqrt()
    torch.testing.assert_close(shared, expected[:, None].expand(2, 2, 16))
    assert share_scales(config, "down", scales) is scales


def test_v_and_up_are_divided_and_so_are_their_biases():
    model = tiny_model("llama-biases")
    config = model.config
    before, after = (read_layer(model.reader, config, 0) for _ in range(2))
    scales = {"o": share_scales(config, "o", scales_of(64)), "down": scales_of(96)}
    sources = {"o": ("qkv", 32), "down": ("gate_up", 96)}
    for key, (source, count) in sources.items():
        folded = fold_scales(after, config, key, scales[key])
        assert folded.source == source and folded.outputs is not None
        divisors = folded.outputs
        assert (divisors[:-count] == 1).all()
        torch.testing.assert_close(after.weights[source] * divisors[:, None], before.weights[source])
        torch.testing.assert_close(after.biases[source] * divisors, before.biases[source])
        torch.testing.assert_close(after.weights[key], before.weights[key] * scales[key])
    per_head = after.weights["o"].view(64, 2, 2, 16) / before.weights["o"].view(64, 2, 2, 16)
    torch.testing.assert_close(per_head[0, :, 0], per_head[0, :, 1])


def test_layers_of_other_keys_are_left_alone():
    model = tiny_model()
    before, after = (read_layer(model.reader, model.config, 1) for _ in range(2))
    fold_scales(after, model.config, "down", scales_of(96))

    def same(layer: FloatLayer, other: FloatLayer, key: str) -> bool:
        return torch.equal(layer.weights[key], other.weights[key])

    assert same(before, after, "qkv") and same(before, after, "o")
    assert torch.equal(before.input_norm, after.input_norm)
