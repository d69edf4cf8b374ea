"""Settings and rules to schemes, and the refusal of everything that does not fit the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.quantization.tiny import SIZES
from trident_llm.errors import BadRequest
from trident_llm.models.model_config import ModelConfig
from trident_llm.quantization.modules import model_modules
from trident_llm.quantization.scheme import (
    LinearScheme,
    QuantizationSettings,
    average_bits,
    make_plan,
    pinned_modules,
)

MISTRAL = ModelConfig(
    architecture="MistralForCausalLM",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=32768,
)
SMOLLM2 = replace(
    MISTRAL,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
TINY = replace(MISTRAL, **SIZES)
ODD = replace(TINY, hidden_size=80, intermediate_size=96)


def plan_of(config: ModelConfig = SMOLLM2, **settings: object) -> dict[str, LinearScheme | None]:
    return dict(make_plan(QuantizationSettings(**settings), config))


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def test_all_layers_get_the_method_and_the_head_eight_bits():
    plan = plan_of(method="gptq")
    assert list(plan) == [module.name for module in model_modules(SMOLLM2)]
    assert plan.pop("lm_head") == LinearScheme("rtn", 8, 64)
    assert set(plan.values()) == {LinearScheme("gptq", 4, 64)}


@pytest.mark.parametrize(("config", "size"), [(SMOLLM2, 64), (MISTRAL, 128), (TINY, 32)])
def test_auto_is_the_largest_group_that_divides_every_width(config, size):
    assert {scheme.group_size for scheme in plan_of(config, method="rtn").values()} == {size}


@pytest.mark.parametrize(("method", "bits"), [("rtn", 4), ("awq", 4), ("gptq", 4), ("smoothquant", 8), ("fp8", 8)])
def test_default_bits(method, bits):
    assert plan_of(method=method)[down(0)].bits == bits


@pytest.mark.parametrize("method", ["smoothquant", "fp8"])
def test_methods_with_eight_bit_activations_have_a_scale_per_output(method):
    plan = plan_of(method=method)
    assert plan[down(3)] == LinearScheme(method, 8, 1536)
    assert plan["lm_head"] == LinearScheme("rtn", 8, 64)


def test_rules_in_order_the_later_wins():
    plan = plan_of(method="awq", layers="0-1=rtn:8 ; .*down_proj = gptq:4:32; 1=none; lm_head=none;")
    assert plan["model.layers.0.mlp.gate_up_proj"] == LinearScheme("rtn", 8, 64)
    assert plan[down(0)] == plan[down(29)] == LinearScheme("gptq", 4, 32)
    assert plan[down(1)] is None and plan["lm_head"] is None
    assert plan["model.layers.2.self_attn.o_proj"] == LinearScheme("awq", 4, 64)


@pytest.mark.parametrize(
    "target", ["model.layers.4.self_attn.qkv_proj", r".*layers\.4\..*(q|k|v)_proj", r".*\.4\.self_attn\.(?!o_).*"]
)
def test_merged_layers_by_their_own_name_or_by_all_their_parts(target):
    plan = plan_of(method="rtn", layers=f"{target}=rtn:6")
    assert [name for name, scheme in plan.items() if scheme.bits == 6] == ["model.layers.4.self_attn.qkv_proj"]


def test_rules_without_a_method_quantize_only_what_they_name():
    plan = plan_of(layers=".*gate_up_proj=gptq:4; lm_head=rtn:8:channel")
    assert sum(scheme is not None for scheme in plan.values()) == 31
    assert plan["lm_head"] == LinearScheme("rtn", 8, 576)


def test_rules_inherit_the_group_size_unless_their_method_has_none():
    plan = plan_of(method="rtn", group_size="32", layers="0=gptq; 1=smoothquant; 2=rtn:4:channel")
    assert [plan[down(layer)].group_size for layer in range(4)] == [32, 1536, 1536, 32]


def test_pinned_layers_are_those_that_rules_name_and_the_head():
    settings = QuantizationSettings(method="gptq", layers="3=rtn:8; .*o_proj=none")
    pinned = pinned_modules(settings, SMOLLM2)
    assert len(pinned) == 30 + 3 + 1 and "lm_head" in pinned and down(3) in pinned and down(4) not in pinned


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({"method": "smoothquant", "bits": 4}, SMOLLM2, "isq_bits: smoothquant has no 4 bits; allowed: 8"),
        ({"method": "gptq", "bits": 7}, SMOLLM2, "isq_bits: gptq has no 7 bits; allowed: 4, 5, 6, 8"),
        ({"bits": 4}, SMOLLM2, "isq_bits: 4 is set, but isq_method is none"),
        (
            {"method": "rtn", "group_size": "128"},
            SMOLLM2,
            r"isq_group_size: group size 128 does not divide the 576 inputs of model\.layers\.0\.self_attn\.qkv_proj; "
            "allowed: auto, 64, 32, channel",
        ),
        ({"method": "rtn"}, ODD, "isq_group_size: auto finds no size among 128, 64, 32 .* has 80.*; give channel"),
        ({"method": "fp8", "group_size": "64"}, SMOLLM2, "isq_group_size: fp8 has one scale per output; 64 is not"),
        ({"method": "rtn", "layers": "30=rtn:8"}, SMOLLM2, "isq_layers: rule '30=rtn:8' matches no layer.*0-29"),
        ({"method": "rtn", "layers": "5-3=none"}, SMOLLM2, "isq_layers: rule '5-3=none' matches no layer"),
        ({"method": "rtn", "layers": "mlp=none"}, SMOLLM2, "isq_layers: rule 'mlp=none' matches no layer"),
        ({"method": "rtn", "layers": "model.embed_tokens=none"}, SMOLLM2, "matches no layer"),
        ({"method": "rtn", "layers": ".*q_proj=rtn:8"}, SMOLLM2, "some of .*q_proj.*which are one layer.*qkv_proj"),
        ({"method": "rtn", "layers": "0"}, SMOLLM2, "isq_layers: '0' is no rule; give LAYERS=METHOD:BITS:GROUP"),
        ({"method": "rtn", "layers": "0=hqq:4"}, SMOLLM2, "isq_layers: '0=hqq:4' is no rule.*METHOD one of rtn, awq"),
        ({"method": "rtn", "layers": "0=rtn:4:64:1"}, SMOLLM2, "is no rule"),
        ({"method": "rtn", "layers": "0=rtn:four"}, SMOLLM2, "bits 'four' is not one of 4, 5, 6, 8"),
        ({"method": "rtn", "layers": "0=rtn:3"}, SMOLLM2, r"isq_layers: rtn has no 3 bits.*\(rule '0=rtn:3'\)"),
        ({"method": "rtn", "layers": "0=rtn:4:48"}, SMOLLM2, "group size '48' is not one of auto, 128, 64, 32, chan"),
        ({"method": "rtn", "layers": "0=rtn:4:128"}, SMOLLM2, "group size 128 does not divide the 576 inputs"),
        ({"method": "rtn", "layers": "0=none:4"}, SMOLLM2, "none has neither bits nor groups"),
        ({"method": "rtn", "layers": "*=rtn:8"}, SMOLLM2, r"'\*' is not a regular expression: nothing to repeat"),
    ],
)
def test_what_does_not_fit_is_refused(settings, config, message):
    with pytest.raises(BadRequest, match=message):
        plan_of(config, **settings)


def test_average_bits_count_scales_and_leave_the_head_out():
    assert average_bits(plan_of(method="rtn"), SMOLLM2) == pytest.approx(4 + 24 / 64)
    assert average_bits(plan_of(method="rtn", bits=8), SMOLLM2) == pytest.approx(8 + 16 / 64)
    half = average_bits(plan_of(method="rtn", layers="0-14=none"), SMOLLM2)
    assert half == pytest.approx((16 + 4 + 24 / 64) / 2)


@pytest.mark.parametrize(("settings", "bound"), [({}, 0.29), ({"bits": 8}, 0.53)])
def test_memory_of_mistral_7b(settings, bound):
    """Of the weights in bits: linear layers and head as planned, embedding and norms in 16."""
    plan = plan_of(MISTRAL, method="awq", **settings)
    sizes = {module.name: module.num_inputs * module.num_outputs for module in model_modules(MISTRAL)}
    rest = MISTRAL.vocab_size * MISTRAL.hidden_size + 65 * MISTRAL.hidden_size
    after = sum(size * plan[name].bits_per_weight for name, size in sizes.items()) + 16 * rest
    assert after < bound * 16 * (sum(sizes.values()) + rest)
