"""The walk over tiny models of each family, with transformers as the oracle of what layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.tiny_decoders import CPU, MAX_LEN, TinyDecoder
from tests.quantization.tiny import FAMILIES, TinyModel, scaled_parameters, tiny_model, token_samples
from trident_llm.errors import LoadFailed
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.quantization import gptq
from trident_llm.quantization.float_layer import LayerForward, read_layer
from trident_llm.quantization.installation import EMBEDDING, Parameter
from trident_llm.quantization.modules import LAYER_MODULES, model_modules
from trident_llm.quantization.statistics import Gatherer


def logits(model: TinyModel, parameters: dict[str, Parameter], tokens: list[int]) -> Tensor:
    decoder = TinyDecoder(model.oracle, model.decoder_of(parameters), model.config)
    (rows,) = decoder.run(PagedSteps(1, max_len=MAX_LEN, block_size=8), [tokens], [[Chunk(0, 0, len(tokens))]])
    return rows


def expected_logits(model: TinyModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model.oracle(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_what_transformers_computes(family):
    model, tokens = tiny_model(family), token_samples()
    forward = LayerForward(
        model.config, length=tokens.shape[1], max_model_len=MAX_LEN, dtype=torch.float32, device=CPU
    )
    with torch.inference_mode():
        states = model.oracle.model(tokens, output_hidden_states=True).hidden_states
        hidden = torch.nn.functional.embedding(tokens, model.reader.read(EMBEDDING))
        # The last of transformers' states has passed the final norm.
        for index in range(model.config.num_hidden_layers - 1):
            layer = read_layer(model.reader, model.config, index)
            hidden = forward(layer, hidden, layer.product)
            torch.testing.assert_close(hidden, states[index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "smoothquant", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_eight_bits_the_model_hardly_changes(family, method):
    model, tokens = tiny_model(family), token_samples()
    settings = {"bits": 8} if method in ("rtn", "awq", "gptq") else {}
    walk = model.walk(tokens, method=method, **settings)
    parameters = dict(walk.parameters())
    assert {name for name, value in parameters.items() if isinstance(value, QuantizedWeight)} == {
        f"{module.name}.weight" for module in model_modules(model.config)
    }
    assert {result.name for result in walk.results} == {module.name for module in model_modules(model.config)}
    sequence = tokens[0].tolist()
    expected, actual = expected_logits(model, sequence), logits(model, parameters, sequence)
    # Integers of 8 bits err by about 0.5% of a layer's output here, e4m3 with its four bits of precision by 2.6%.
    bound = 0.16 if method == "fp8" else 0.04
    assert (actual - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_alone_change_nothing(family):
    """What awq and smoothquant fold into norms, v and up, undone by hand, is the checkpoint's model."""
    model, tokens = tiny_model(family), token_samples()
    parameters = dict(model.walk(tokens, method="awq").parameters())
    scales = [value for name, value in parameters.items() if name.endswith("_proj.input_scales")]
    assert len(scales) == 12 and sum((scale != 1).any() for scale in scales) > 6
    torch.testing.assert_close(
        logits(model, scaled_parameters(model, parameters), tokens[0].tolist()),
        expected_logits(model, tokens[0].tolist()),
        rtol=0,
        atol=2e-4,
    )


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2"])
def test_everything_that_scales_change_is_handed_on(family, method, monkeypatch):
    """However short-lived a tensor was, and wherever the memory of the next one lies."""
    monkeypatch.setattr("trident_llm.quantization.walk.id", lambda tensor: 0, raising=False)
    model = tiny_model(family)
    names = set(dict(model.walk(token_samples(), method=method).parameters()))
    expected = {"lm_head.weight"}
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        expected |= {f"{prefix}{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            expected |= {f"{prefix}{module}.weight", f"{prefix}{module}.input_scales"}
        for module in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
            expected.add(f"{prefix}{module}.output_scales")
            if f"{prefix}{module.replace('qkv', 'q').replace('gate_up', 'gate')}.bias" in model.reader.shapes:
                expected.add(f"{prefix}{module}.bias")
    assert names == expected


def test_a_layer_is_calibrated_on_what_the_quantized_layers_before_it_make():
    model, tokens = tiny_model(), token_samples(16)
    parameters = dict(model.walk(tokens, method="gptq").parameters())
    forward = LayerForward(
        model.config, length=tokens.shape[1], max_model_len=MAX_LEN, dtype=torch.float32, device=CPU
    )
    first, second = (read_layer(model.reader, model.config, index) for index in (0, 1))
    modules = model_modules(model.config)
    for key, module in zip(LAYER_MODULES, modules[:4], strict=True):
        first.weights[key] = parameters[f"{module.name}.weight"].dequantize()
    gatherer = Gatherer(64, tokens.numel(), CPU, hessian=True)

    def product(key: str, x: Tensor) -> Tensor:
        if key == "qkv":
            gatherer.add(x)
        return second.product(key, x)

    with torch.inference_mode():
        hidden = torch.nn.functional.embedding(tokens, model.reader.read(EMBEDDING))
        forward(second, forward(first, hidden, first.product), product)
        expected = gptq.quantize(second.weights["qkv"], gatherer.result(), bits=4, group_size=32, symmetric=False)
    actual = parameters[f"{modules[4].name}.weight"]
    assert (actual.codes == expected.codes).float().mean() > 0.99


def test_rules_leave_layers_in_full_precision_and_mix_methods():
    model, tokens = tiny_model(), token_samples()
    layers = "0=none; .*down_proj=rtn:6; lm_head=none"
    walk = model.walk(tokens, method="gptq", layers=layers)
    parameters = dict(walk.parameters())
    names = {name.removesuffix(".weight"): value for name, value in parameters.items()}
    modules = [module.name for module in model_modules(model.config)]
    assert set(names) == {modules[3], *modules[4:12]}
    assert [names[name].bits for name in modules[4:8]] == [4, 4, 4, 6]
    assert {str(result.scheme) for result in walk.results if "down" in result.name} == {"rtn 6 bits, group 32"}


def test_methods_without_calibration_need_no_samples():
    model = tiny_model()
    assert len(dict(model.walk(method="rtn").parameters())) == 13
    assert len(dict(model.walk(method="fp8").parameters())) == 13


def test_progress_says_layer_method_error_and_time_left():
    lines: list[str] = []
    model = tiny_model()
    list(model.walk(token_samples(), lines.append, method="awq", layers="1=none").parameters())
    assert len(lines) == 3
    assert lines[0].startswith("quantizing layer 1 of 3: awq 4 bits, group 32, error ")
    assert lines[0].endswith(" s left") and "%" in lines[0]
    assert lines[1].startswith("quantizing layer 2 of 3: full precision, ")


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = model.reader.read(name).clone()
    broken[3, 5] = float("nan")
    model.reader._tensors[name] = broken
    with pytest.raises(LoadFailed, match=r"weight of model\.layers\.1\.self_attn\.qkv_proj.*not finite"):
        list(model.walk(method="rtn").parameters())
