"""X-LoRA through the whole engine equals PEFT's XLoraModel, which knows no cache: paged, cached, chunked, batched."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.conftest import AdaptedModel
from tests.adapters.test_adapter_engine import make_core, make_submit, prompt_of, run
from tests.fakes.peft_adapters import greedy, peft_blend
from tests.fakes.peft_mixes import greedy_without_cache, scalings, write_mix
from trident_llm.adapters.xlora_config import CLASSIFIER_FILE
from trident_llm.engine.engine import EngineCore
from trident_llm.errors import BadRequest, NotFound, TridentError
from trident_llm.protocol import SampleStart

MEMBERS: dict[str, dict[str, Any]] = {
    "one": {"r": 4}, "two": {"r": 3, "targets": ("q_proj", "v_proj", "up_proj")}, "three": {"r": 4, "use_rslora": True},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2},
    "deep-top-2": {"layerwise_scalings": True, "xlora_depth": 3, "top_k_lora": 2, "softmax_temperature": 0.5},
    "softmax-topk": {
        "layerwise_scalings": True, "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
        "global_scaling_weight": 1.3,
    },
    "no-softmax": {"enable_softmax": False, "global_scaling_weight": 0.5},
    "scaled-pass": {"scaling_pass_value": 0.4, "layerwise_scalings": True},
}  # fmt: skip


@dataclass(frozen=True)
class TestedMix:
    __test__ = False

    folder: Path
    oracle: Any

    def core(self, adapted: AdaptedModel, **settings: Any) -> EngineCore:
        return make_core(adapted, **{"adapters": "", "xlora": str(self.folder), **settings})


@pytest.fixture(scope="module")
def mixes(adapted: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestedMix]:
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        folder = tmp_path_factory.mktemp(name)
        found[name] = TestedMix(folder, write_mix(adapted.base, folder, MEMBERS, seed=seed, **config))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_64_tokens_equal_peft(name: str, mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes[name], prompt_of(21, seed=8)
    core = mix.core(adapted)
    submit = make_submit(prompt, max_tokens=64)
    tokens = run(core, [submit])[submit.request_id]
    assert tokens == greedy_without_cache(mix.oracle, prompt, 64)
    assert tokens != greedy(adapted.base, prompt, 64)
    assert core.stats()["kv_blocks_used"] == 0
    core.close()


NEW_TOKENS = 8


@pytest.fixture(scope="module")
def cases(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> list[tuple[dict[str, Any], list[int], list[int]]]:
    """16 requests, some with equal beginnings: options, prompt, PEFT's tokens."""
    from peft import PeftModel

    mix, shared, found = mixes["deep-top-2"], prompt_of(24, seed=77), []
    member = PeftModel.from_pretrained(copy.deepcopy(adapted.base), mix.folder / "adapters" / "one").eval()
    for index in range(16):
        prompt = shared[: 8 * (index % 4)] + prompt_of(5 + index, seed=300 + index // 2)
        if index % 4 == 3:
            found.append(({"xlora": False}, prompt, greedy(adapted.base, prompt, NEW_TOKENS)))
        elif index % 8 == 2:
            found.append(({"adapter": "one"}, prompt, greedy(member, prompt, NEW_TOKENS)))
        else:
            found.append(({}, prompt, greedy_without_cache(mix.oracle, prompt, NEW_TOKENS)))
    return found


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 64, "max_loras": 3}, False),
        ({"max_num_blocks": 24, "max_num_seqs": 12, "max_model_len": 96}, True),
        ({"max_num_blocks": 24, "max_num_seqs": 12, "max_model_len": 96, "prefix_caching": False}, True),
    ],
    ids=["whole", "chunked", "small-pool", "small-pool-uncached"],
)
@pytest.mark.parametrize("lookahead", [False, True])
def test_a_mixed_batch_equals_peft(
    mixes: dict[str, TestedMix], adapted: AdaptedModel, cases: list[tuple[dict[str, Any], list[int], list[int]]],
    settings: dict[str, Any], preempts: bool, lookahead: bool,
) -> None:  # fmt: skip
    core = mixes["deep-top-2"].core(adapted, **settings)
    core._lookahead = lookahead
    for _ in range(2):
        submits = [make_submit(prompt, max_tokens=NEW_TOKENS, **options) for options, prompt, _ in cases]
        tokens = run(core, submits, steps_between=1 if lookahead else 0)
        for submit, (options, _, expected) in zip(submits, cases, strict=True):
            assert tokens[submit.request_id] == expected, options
    stats = core.stats()
    assert (stats["preemptions_total"] > 0) == preempts
    assert (stats["prefix_cache_hit_tokens_total"] > 0) == settings.get("prefix_caching", True)
    assert stats["kv_blocks_used"] == 0
    core.close()


def test_the_first_pass_shares_its_blocks_with_plain_requests(
    mixes: dict[str, TestedMix], adapted: AdaptedModel
) -> None:
    core, prompt = mixes["dense"].core(adapted), prompt_of(41, seed=9)
    expected = greedy_without_cache(mixes["dense"].oracle, prompt, 3)

    def cached(**options: Any) -> tuple[int, list[int]]:
        submit, tokens, hits = make_submit(prompt, max_tokens=3, **options), [], 0
        core.add(submit)
        while core.has_work():
            for delta in core.step():
                tokens += delta.token_ids
                hits = max(hits, delta.num_cached_tokens)
            core.check_integrity()
        return hits, tokens

    assert cached() == (0, expected)
    used = core.stats()["kv_blocks_cached"]
    assert used == 2 * (43 // 8), "blocks of both passes"
    assert cached(xlora=False) == (40, greedy(adapted.base, prompt, 3)), "found what the first pass computed"
    assert cached() == (40, expected)
    assert core.stats()["kv_blocks_cached"] == used
    # With other options the first pass is the same, and its blocks are kept although it is computed again.
    assert cached(xlora_top_k=1)[0] == 0
    assert core.stats()["kv_blocks_cached"] == used + 43 // 8
    core.close()


def test_options_change_top_k_and_temperature(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes["layerwise"], prompt_of(18, seed=3)
    core = mix.core(adapted, top_k_adapters=2, scaling_factor=1.5)
    oracle = copy.deepcopy(mix.oracle)
    oracle.base_model.set_global_scaling_weight(1.5)
    classifier = oracle.base_model.internal_xlora_classifier
    submits, expected = [], []
    for top_k, temperature in [(None, None), (1, None), (0, 0.3), (3, 4.0)]:
        oracle.base_model.set_topk_lora({None: 2, 0: None}.get(top_k, top_k))
        classifier.softmax.temperature = temperature or 1.0
        expected.append(greedy_without_cache(oracle, prompt, NEW_TOKENS))
        submits.append(
            make_submit(prompt, max_tokens=NEW_TOKENS, xlora_top_k=top_k, xlora_temperature=temperature)
        )
    tokens = run(core, submits)
    assert [tokens[submit.request_id] for submit in submits] == expected
    assert len({tuple(row) for row in expected}) > 1
    with pytest.raises(BadRequest, match="xlora_top_k: 4 is more than the 3 adapters of 'xlora'"):
        core.add(make_submit(prompt, xlora_top_k=4))
    with pytest.raises(BadRequest, match="xlora_temperature: this request takes no X-LoRA mix"):
        core.add(make_submit(prompt, "one", xlora_temperature=0.5))
    core.close()


def frozen(oracle: Any, position: int) -> Any:
    """PEFT's model with the scalings of ``position`` - 1 at ``position`` and all after."""
    model = copy.deepcopy(oracle)
    classifier = model.base_model.internal_xlora_classifier
    forward = classifier.forward

    def freeze(*args: Any, **kwargs: Any) -> Any:
        scalings = forward(*args, **kwargs)
        scalings[:, position:] = scalings[:, position - 1 : position]
        return scalings

    classifier.forward = freeze
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}, {"max_num_blocks": 16, "max_model_len": 64}],
    ids=["whole", "chunked", "small-pool"],
)
def test_frozen_scalings_stay(
    mixes: dict[str, TestedMix], adapted: AdaptedModel, settings: dict[str, Any]
) -> None:
    mix, freeze_after, num_tokens = mixes["layerwise"], 3, 12
    core = mix.core(adapted, freeze_after=freeze_after, **settings)
    prompts = [prompt_of(11 + 6 * index, seed=60 + index) for index in range(3)]
    expected = [
        greedy_without_cache(frozen(mix.oracle, len(prompt) + freeze_after), prompt, num_tokens) for prompt in prompts
    ]
    assert expected[0] != greedy_without_cache(mix.oracle, prompts[0], num_tokens)
    for _ in range(2):
        submits = [make_submit(prompt, max_tokens=num_tokens) for prompt in prompts]
        tokens = run(core, submits)
        assert [tokens[submit.request_id] for submit in submits] == expected
    # What came after the freeze depends on where the prompt ended: a longer prompt must not find it.
    longer = prompts[0] + expected[0][:10]
    submit = make_submit(longer, max_tokens=4)
    found = run(core, [submit])[submit.request_id]
    assert found == greedy_without_cache(frozen(mix.oracle, len(longer) + freeze_after), longer, 4)
    assert (core.stats()["preemptions_total"] > 0) == ("max_num_blocks" in settings)
    core.close()


def test_static_routing_is_a_blend(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes["dense"], prompt_of(15, seed=4)
    core = mix.core(adapted, routing_method="static", scaling_factor=1.2)
    submit = make_submit(prompt, max_tokens=NEW_TOKENS)
    oracle = peft_blend(adapted.base, {mix.folder / "adapters" / name: 0.4 for name in MEMBERS})
    assert run(core, [submit])[submit.request_id] == greedy(oracle, prompt, NEW_TOKENS)
    assert core.stats()["adapter_usage"]["xlora"] == {"requests": 1, "generated_tokens": NEW_TOKENS}
    core.close()


def test_scalings_are_returned(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes["layerwise"], prompt_of(15, seed=5)
    core = mix.core(adapted)
    submit, tokens, returned = make_submit(prompt, max_tokens=5, return_scalings=True), [], []
    plain = make_submit(prompt, max_tokens=5, xlora=False, return_scalings=True)
    core.add(submit)
    core.add(plain)
    while core.has_work():
        for delta in core.step():
            if delta.request_id == plain.request_id:
                assert delta.scalings is None
                continue
            tokens += delta.token_ids
            returned.append(delta.scalings)
    expected = scalings(mix.oracle, prompt + tokens[:-1])[-5:].mean(1)
    means = torch.tensor([[value for (value,) in row.values()] for row in returned])
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-5)
    assert list(returned[0]) == list(MEMBERS)
    torch.testing.assert_close(means.sum(1), torch.ones(5), rtol=0, atol=1e-5)
    core.close()


def test_scalings_are_returned_by_layer(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    prompt = prompt_of(15, seed=5)
    for name in ("layerwise", "dense"):
        core = mixes[name].core(adapted)
        core.add(make_submit(prompt, max_tokens=1, return_layer_scalings=True))
        (delta,) = core.step()
        assert delta.scalings is not None
        modules = scalings(mixes[name].oracle, prompt)[-1]
        # Every module of both layers is updated by some member.
        torch.testing.assert_close(
            torch.tensor(list(delta.scalings.values())), modules.view(2, 7, 3).mean(1).T, rtol=1e-4, atol=1e-5
        )
        core.close()


def test_samples_of_a_request_share_both_passes(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes["dense"], prompt_of(19, seed=6)
    core = mix.core(adapted)
    submit = make_submit(prompt, max_tokens=NEW_TOKENS, samples=[SampleStart(index=index) for index in range(3)])
    tokens = run(core, [submit])[submit.request_id]
    assert sorted(tokens) == sorted(greedy_without_cache(mix.oracle, prompt, NEW_TOKENS) * 3)
    usage = {name: tuple(used.values()) for name, used in core.stats()["adapter_usage"].items()}
    assert usage == {"xlora": (1, 3 * NEW_TOKENS), **dict.fromkeys((*MEMBERS, "_other"), (0, 0))}
    core.close()


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


def test_a_prompt_must_leave_room_for_both_passes(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    core = mixes["dense"].core(adapted, max_num_blocks=9, max_model_len=72)
    with pytest.raises(BadRequest, match=r"at most 31 .*two passes"):
        core.add(make_submit(prompt_of(32, seed=1)))
    submit = make_submit(prompt_of(25, seed=1), max_tokens=40)
    assert len(run(core, [submit])[submit.request_id]) == 7, "to the end of what fits"
    core.close()


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
