"""Mixes come, change and go while requests run, survive an engine, and are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.helpers import AdaptedModel, make_submit, prompt_of, run
from tests.adapters.mixes import MEMBERS, NEW_TOKENS, TestedMix
from tests.fakes.peft_adapters import greedy
from tests.fakes.peft_mixes import greedy_without_cache
from trident_llm.adapters.xlora_config import CLASSIFIER_FILE
from trident_llm.engine.engine import EngineCore
from trident_llm.errors import BadRequest, NotFound, TridentError
from trident_llm.protocol import SampleStart


def test_several_mixes_in_one_batch_and_a_replaced_one(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    """A running request keeps the mix it began with; names and files go with the last user."""
    root = mixes["dense"].folder.parent
    core = mixes["dense"].core(adapted, max_loras=9, max_cpu_loras=9, adapter_root=str(root))
    prompt = prompt_of(17, seed=2)
    first = make_submit(prompt, max_tokens=NEW_TOKENS)
    core.add(first)
    tokens = core.step()[0].token_ids
    with pytest.raises(BadRequest, match="mix 'second': the name of its member 'one' is taken"):
        _wait(core, "load_xlora", path=mixes["layerwise"].folder.name, name="second")
    described = _wait(core, "load_xlora", path=mixes["layerwise"].folder.name)
    assert described["adapters"] == list(MEMBERS)
    second = make_submit(prompt, "xlora", max_tokens=NEW_TOKENS)
    found = run(core, [second])
    assert tokens + found[first.request_id] == greedy_without_cache(mixes["dense"].oracle, prompt, NEW_TOKENS)
    assert found[second.request_id] == greedy_without_cache(mixes["layerwise"].oracle, prompt, NEW_TOKENS)
    core.poll()
    listed = _wait(core, "list_adapters")
    assert [adapter["mix"] for adapter in listed["adapters"]] == ["xlora"] * 3
    assert [mix["name"] for mix in listed["mixes"]] == ["xlora"]
    assert _wait(core, "unload_adapter", name="xlora")["users"] == 0
    assert _wait(core, "list_adapters") == {"adapters": [], "mixes": [], "slots": 9}
    assert list(core.stats()["adapter_usage"]) == ["_other"]
    core.check_integrity()
    with pytest.raises(NotFound, match="xlora: no X-LoRA mix is loaded"):
        core.add(make_submit(prompt, xlora=True))
    submit = make_submit(prompt, max_tokens=4)
    assert run(core, [submit])[submit.request_id] == greedy(adapted.base, prompt, 4)
    core.close()


def _wait(core: EngineCore, command: str, **arguments: Any) -> dict[str, Any]:
    assert core.adapters is not None
    return core.adapters.wait(core.run_command(command, arguments))


def test_an_engine_that_takes_over_has_the_mix(
    mixes: dict[str, TestedMix], adapted: AdaptedModel, tmp_path: Path
) -> None:
    mix, prompt = mixes["dense"], prompt_of(17, seed=2)
    first = mix.core(adapted, adapter_folder=tmp_path / "copies")
    request = make_submit(prompt, max_tokens=NEW_TOKENS)
    first.add(request)
    deltas = [first.step()[0] for _ in range(3)]
    first.close()
    second = mix.core(adapted, adapter_folder=tmp_path / "copies")
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert deltas[0].adapter == "xlora@1"
    rest = make_submit(
        prompt, deltas[0].adapter, max_tokens=NEW_TOKENS, samples=[SampleStart(index=0, output_ids=tokens)]
    )
    found = run(second, [rest])[rest.request_id]
    assert tokens + found == greedy_without_cache(mix.oracle, prompt, NEW_TOKENS)
    second.close()


def _spoil(folder: Path, **values: Any) -> None:
    path = folder / "xlora_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-members": (lambda folder: _spoil(folder, adapters={}), "adapters names no members"),
    "outside": (lambda folder: _spoil(folder, adapters={"../one": ""}), "'../one' is no name of an adapter"),
    "missing-member": (lambda folder: _spoil(folder, adapters={"nobody": ""}), "no folder adapters/nobody"),
    "hidden-size": (lambda folder: _spoil(folder, hidden_size=65), "hidden_size is 65; the base model's is 64"),
    "depth": (lambda folder: _spoil(folder, xlora_depth=2), "the classifier has 1 layers; xlora_depth says 2"),
    "layerwise": (lambda folder: _spoil(folder, layerwise_scalings=True), r"shape \[3, 64\]; .* say \[42, 64\]"),
    "mean-pool": (lambda folder: _spoil(folder, use_mean_pool=True), "use_mean_pool is not supported"),
    "temperature": (lambda folder: _spoil(folder, softmax_temperature=0), "softmax_temperature 0.0 is not greater"),
    "top-k": (lambda folder: _spoil(folder, top_k_lora=4), "top_k_lora 4 is more than the 3 adapters"),
    "no-classifier": (lambda folder: (folder / "xlora_classifier.safetensors").unlink(), "no xlora_classifier"),
    "not-finite": (
        lambda folder: save_file({"last.weight": torch.full((3, 64), float("nan"))}, folder / CLASSIFIER_FILE),
        "the classifier holds values that are not finite",
    ),
    "other-tensors": (
        lambda folder: save_file({"head.weight": torch.zeros(3, 64)}, folder / CLASSIFIER_FILE),
        "tensor 'head.weight' is not part of an X-LoRA classifier",
    ),
}  # fmt: skip


def test_what_is_no_mix_is_refused_and_nothing_changed(
    mixes: dict[str, TestedMix], adapted: AdaptedModel, tmp_path: Path
) -> None:
    core = mixes["dense"].core(adapted, adapter_root=str(tmp_path))
    before = _wait(core, "list_adapters")
    for name, (spoil, reason) in REFUSED.items():
        shutil.copytree(mixes["dense"].folder, tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(TridentError, match=f"mix 'xlora'.*: .*{reason}"):
            _wait(core, "load_xlora", path=name)
    assert _wait(core, "list_adapters") == before
    core.check_integrity()
    core.close()
