"""bench_quality as a command with a tiny model, and what it rests on: texts held out, divergence, folding, verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from load_tests.divergence import compare, refer
from load_tests.quality_texts import KINDS, num_sequences, read_text, text_sequences
from load_tests.quality_variants import ESSENTIAL, VARIANTS, chosen_variants
from load_tests.quality_verdict import is_valid, verdicts
from tests.fakes.tiny_models import write_tiny_llama
from trident_llm.quantization.calibration import SHIPPED
from trident_llm.text import Tokenizer

ROOT = Path(__file__).parents[2]
LONG_PASSAGE = 60
"""Characters, runs of white space counted as one."""


@pytest.fixture
def folded_model(monkeypatch):
    """The module, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(ROOT / "load_tests")
    import folded_model

    return folded_model


@pytest.fixture
def quality_curves(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "load_tests")
    import quality_curves

    return quality_curves


def calibration_texts() -> list[str]:
    records = map(json.loads, SHIPPED.read_text(encoding="utf-8").splitlines())
    return [
        record["text"] if "text" in record else "\n".join(message["content"] for message in record["messages"])
        for record in records
    ]


def passages(text: str) -> set[str]:
    text = " ".join(text.split())
    return {text[start : start + LONG_PASSAGE] for start in range(len(text) - LONG_PASSAGE + 1)}


def test_no_long_passage_is_both_calibrated_and_evaluated_on():
    calibrated = set().union(*map(passages, calibration_texts()))
    assert len(calibrated) > 200_000
    for kind in KINDS:
        assert not calibrated & passages(read_text(kind)), kind


def test_the_texts_have_the_promised_sizes(smollm2_folder):
    tokenizer = Tokenizer(smollm2_folder)
    assert {kind: len(tokenizer.encode(read_text(kind))) for kind in KINDS} == {"prose": 53974, "code": 57724}
    assert SHIPPED.stat().st_size <= 400_000
    assert 64_000 <= sum(len(tokenizer.encode(text)) for text in calibration_texts()) <= 128_000


@pytest.mark.parametrize("folder", [SHIPPED.parent, ROOT / "load_tests/data"])
def test_licences_lie_beside_the_texts(folder):
    readme = (folder / "README.md").read_text()
    licences = sorted(path.name for path in (folder / "licenses").iterdir())
    assert licences and all(f"licenses/{name}" in readme for name in licences)


def test_sequences_begin_as_the_tokenizer_begins_a_text_and_are_spread_evenly(tmp_path):
    tokenizer = Tokenizer(write_tiny_llama(tmp_path / "tiny"))
    beginning = tokenizer.encode("")
    every, few = (text_sequences(tokenizer, "prose", 1000, most) for most in (None, 3))
    assert len(every) > 200 and len(few) == 3 and few[0] == every[0] and all(part in every for part in few)
    assert all(len(part) == 1000 and part[: len(beginning)] == beginning for part in few)
    with pytest.raises(ValueError, match=r"prose: .* a sequence has 1000000"):
        text_sequences(tokenizer, "prose", 1_000_000)


def test_all_of_a_text_is_asked_for_by_no_number_of_tokens():
    assert [num_sequences(tokens, 512) for tokens in (0, 1, 1100)] == [None, 1, 2]


@dataclass(frozen=True)
class FakeChunk:
    """Of a model whose head is the identity."""

    hidden: Tensor
    following: Tensor

    @property
    def logits(self) -> Tensor:
        return self.hidden

    @property
    def logprobs(self) -> Tensor:
        return torch.log_softmax(self.logits, -1).gather(1, self.following[:, None]).flatten()


def test_divergence_is_that_of_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(0)
    expected = 3 * torch.randn(40, 500, generator=generator)
    found = expected + 0.3 * torch.randn(expected.shape, generator=generator)
    following = torch.randint(500, (40,), generator=generator)

    def chunks(logits: Tensor) -> list[FakeChunk]:
        return [FakeChunk(logits[rows], following[rows]) for rows in (slice(0, 25), slice(25, 40))]

    reference = refer(chunks(expected), head=lambda hidden: hidden)
    result = compare(reference, chunks(found))
    exact = kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(result.divergence, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.logprobs, FakeChunk(found, following).logprobs)
    assert torch.equal(result.same_top, found.argmax(-1) == expected.argmax(-1)) and not result.same_top.all()
    same = compare(reference, chunks(expected))
    assert same.divergence.abs().max() < 1e-5 and bool(same.same_top.all())


@pytest.mark.parametrize("tied", [True, False])
def test_a_folded_model_computes_the_same_from_other_weights(folded_model, tmp_path, tied):
    from transformers import LlamaForCausalLM

    plain, folder = write_tiny_llama(tmp_path / "plain", tie_word_embeddings=tied), tmp_path / "folded"
    folded_model.write_folded_model(str(plain), folder)
    models = [LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (plain, folder)]
    norms = {name: value for name, value in models[1].named_parameters() if name.endswith("norm.weight")}
    assert len(norms) == 5 and all(bool((value == 1).all()) for value in norms.values())
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(models[1](tokens).logits, models[0](tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_gguf_file_is_folded_once(folded_model, smollm2_gguf, monkeypatch):
    checked = []
    monkeypatch.setattr(folded_model, "check_same_function", lambda *models: checked.append(models))
    with tempfile.TemporaryDirectory() as work:
        folder = folded_model.unfolded_or_folded(str(smollm2_gguf), Path(work))
        assert Path(folder).parent == Path(work) and (Path(folder) / "tokenizer.json").is_file()
        assert folded_model.unfolded_or_folded(str(smollm2_gguf), Path(work)) == folder
        assert len(checked) == 1 and checked[0][0] == str(smollm2_gguf)


def test_a_model_that_is_no_gguf_file_is_measured_as_it_is(folded_model, tmp_path):
    plain = str(write_tiny_llama(tmp_path / "plain"))
    assert folded_model.unfolded_or_folded(plain, tmp_path / "work") == plain


def test_a_wrongly_folded_model_is_noticed(folded_model, tmp_path):
    one, other = (str(write_tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    folded_model.check_same_function(one, one)
    with pytest.raises(ValueError, match="its logits are up to"):
        folded_model.check_same_function(one, other)


def measured(**losses: float) -> dict[str, dict[str, float]]:
    return {name.replace("_", "-"): {"loss_percent": loss, "average_bits": 5.0} for name, loss in losses.items()}


def test_what_must_be_is_held_against_rtn_in_groups_of_the_same_size():
    found = verdicts(measured(rtn_4=20, awq_4=14, gptq_4=14, rtn_4_32=10, gptq_4_32=6, awq_4_channel=9, awq_5=1))
    assert [(str(verdict).split(":")[0], verdict.passed) for verdict in found] == [
        ("PASS  awq-4", True),
        ("FAIL  gptq-4", False),
        ("PASS  gptq-4-32", True),
    ]
    assert "0.70 of the loss of rtn-4; at most 0.65" in str(found[1])


def test_8_bits_and_chosen_bits_have_bounds_of_their_own():
    values = measured(rtn_8=0.5, smoothquant=1.9, awq_loss=4.9, gptq_loss=5.1, rtn_loss=4.0)
    values["rtn-loss"]["average_bits"] = 6.3
    assert [verdict.passed for verdict in verdicts(values)] == [False, True, True, False, False]


def test_a_model_that_4_bits_cost_nothing_proves_nothing():
    assert is_valid(measured(rtn_4=2.0)) and is_valid(measured(awq_4=0.1))
    assert not is_valid(measured(rtn_4=1.9))


def test_variants_go_by_name():
    assert chosen_variants("essential") == list(ESSENTIAL) and set(ESSENTIAL) <= set(VARIANTS)
    assert chosen_variants("all") == list(VARIANTS) and chosen_variants("gptq-5, rtn-8") == ["gptq-5", "rtn-8"]
    assert VARIANTS["awq-4-32"] == {"isq_method": "awq", "isq_bits": "4", "isq_group_size": "32"}
    with pytest.raises(ValueError, match="gptq-3: not among essential, all, rtn-4"):
        chosen_variants("rtn-4,gptq-3")


def test_curves_are_drawn_of_what_was_measured(quality_curves, tmp_path):
    line = {"model": "m", "device": "d", "workload": "both", "benchmark": "bench_quality"}
    lines = [
        {**line, "variant": variant, "metric": metric, "value": value}
        for variant in ("rtn-4", "rtn-4-32", "rtn-8", "gptq-loss", "smoothquant")
        for metric, value in (("loss_percent", 3.0), ("average_bits", 5.0))
    ]
    others = [{**lines[0], "device": "other"}, {**lines[0], "workload": "prose"}, {**lines[0], "model": "n"}]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, [*others, *lines, {**lines[0], "value": 4.0}])))
    found = quality_curves.read_measured(file, "m")
    assert found["rtn-4"] == {"loss_percent": 4.0, "average_bits": 5.0} and len(found) == 5
    for draw in (quality_curves.draw_bits, quality_curves.draw_groups):
        draw(found, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bench(model_folder, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "load_tests/bench_quality.py"), f"--model={model_folder}"]
        command += ["--name=tiny", "--set=dtype=fp32", "--set=num_threads=1", "--device=cpu", "--tokens=600"]
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            [*command, "--length=300", f"--out={tmp_path / 'out.jsonl'}", *arguments],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip

    return run


def test_variants_are_held_against_full_precision(bench, tmp_path):
    result = bench("--variants=rtn-4,rtn-8,rtn-4-128")
    assert "PASS  rtn-8" in result.stdout, result.stderr
    assert result.returncode == 0
    file = tmp_path / "out.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    values = {(line["variant"], line["workload"], line["metric"]): line["value"] for line in lines}
    assert {line["variant"] for line in lines} == {"reference", "rtn-4", "rtn-8"}
    for kind in ("prose", "code", "both"):
        exact, rounded = (values[variant, kind, "perplexity"] for variant in ("reference", "rtn-4"))
        assert values["rtn-4", kind, "loss_percent"] == pytest.approx(100 * (rounded / exact - 1), abs=1e-3)
        assert values["rtn-4", kind, "kl_millinats"] > 20 * values["rtn-8", kind, "kl_millinats"] > 0
        assert values["rtn-4", kind, "same_top_percent"] < values["rtn-8", kind, "same_top_percent"] < 100
    assert (values["reference", "both", "average_bits"], values["rtn-8", "both", "average_bits"]) == (32, 8.25)
    assert values["rtn-4", "both", "weights_mib"] < values["rtn-8", "both", "weights_mib"]
    assert bench("--variants=rtn-4,rtn-8", "--resume").returncode == 0
    assert len(file.read_text().splitlines()) == len(lines)


def test_what_proves_nothing_is_declared_invalid(bench, tmp_path):
    line = {"model": "tiny", "workload": "both", "benchmark": "bench_quality", "variant": "rtn-4", "device": "d"}
    result = bench("--variants=rtn-5")
    assert result.returncode == 0, result.stderr
    file = tmp_path / "out.jsonl"
    line["device"] = json.loads(file.read_text().splitlines()[-1])["device"]
    with file.open("a") as stream:
        stream.write(json.dumps({**line, "metric": "loss_percent", "value": 1.5}) + "\n")
    result = bench("--variants=rtn-5")
    assert result.returncode == 1 and "INVALID  rtn-4 loses 1.50%" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants=rtn-3"], "--variants: rtn-3: not among essential, all, rtn-4"),
        (["--variants=rtn-4", "--length=1000"], "max_model_len: 1000 is more than the model's own limit"),
        (["--variants=rtn-4", "--set=isq_methods=rtn"], "isq_methods"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, arguments, message):
    result = bench(*arguments)
    assert result.returncode != 0
    assert message in result.stderr
