"""Adapters beside weights whose inputs were scaled: logits equal PEFT's on the model as it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.adapters.test_adapter_logits import put_into_slots, run
from tests.fakes.peft_adapters import ALL_LINEAR, logits, write_adapter
from tests.fakes.tiny_decoders import TinyDecoder
from tests.quantization.tiny import scaled_parameters, tiny_model, token_samples

CASES = {
    "lora": {"targets": ALL_LINEAR, "r": 7},
    "dora": {"targets": ALL_LINEAR, "use_dora": True},
}


@dataclass(frozen=True)
class Scaled:
    tiny: TinyDecoder
    ids: list[int]


@pytest.fixture(scope="module", params=["awq", "smoothquant"])
def scaled(request) -> Scaled:
    model, tokens = tiny_model("llama-biases"), token_samples()
    walk = model.walk(tokens, method=request.param)
    decoder = model.decoder_of(scaled_parameters(model, dict(walk.parameters())))
    return Scaled(TinyDecoder(model.oracle, decoder, model.config), tokens[0].tolist())


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_adds_what_it_adds_to_the_plain_model(scaled, case, tmp_path: Path):
    oracle = write_adapter(scaled.tiny.oracle, tmp_path, seed=3, **CASES[case])
    put_into_slots(scaled.tiny, [tmp_path])
    (found,) = run(scaled.tiny, [[1.0, 0.0, 0.0]], [scaled.ids], chunk=13)
    expected = logits(oracle, scaled.ids)
    assert (expected - scaled.tiny.expected(scaled.ids)).abs().max() > 0.1, "the adapter changes nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
