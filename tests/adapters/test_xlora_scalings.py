"""What decides the scalings of a mix, and what a request is told of them, against PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.adapters.helpers import AdaptedModel, make_submit, prompt_of, run
from tests.adapters.mixes import MEMBERS, NEW_TOKENS, TestedMix
from tests.fakes.peft_adapters import greedy, peft_blend
from tests.fakes.peft_mixes import greedy_without_cache, scalings
from trident_llm.engine.mix_pass import MixPass
from trident_llm.errors import BadRequest
from trident_llm.protocol import Submit


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


def test_weights_are_found_again_only_when_the_batch_changes(
    mixes: dict[str, TestedMix], adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = 0
    find = MixPass._find

    def counted(*args: Any) -> Any:
        nonlocal found
        found += 1
        return find(*args)

    monkeypatch.setattr(MixPass, "_find", counted)
    core = mixes["layerwise"].core(adapted, freeze_after=2, prefix_caching=False)
    options: list[dict[str, Any]] = [
        {}, {"xlora_top_k": 1, "return_scalings": True}, {"adapter": "two", "max_tokens": 6}, {"max_tokens": 12},
        {"adapter": "one:0.5", "max_tokens": 14},
    ]  # fmt: skip
    requests = [
        {"prompt": prompt_of(9 + index, seed=index), "max_tokens": 40, **option} for index, option in enumerate(options)
    ]

    def scaled_run(submits: list[Submit]) -> list[tuple[list[int], list[Any]]]:
        answers: dict[str, tuple[list[int], list[Any]]] = {submit.request_id: ([], []) for submit in submits}
        waiting = list(submits)
        while waiting or core.has_work():
            if waiting:
                core.add(waiting.pop(0))
            for _ in range(4):
                for delta in core.step():
                    answers[delta.request_id][0].extend(delta.token_ids)
                    answers[delta.request_id][1].append(delta.scalings)
        return list(answers.values())

    alone = [scaled_run([make_submit(**request)])[0] for request in requests]
    found, steps = 0, core.counters["steps_total"]
    for (tokens, returned), (expected, scalings_alone) in zip(
        scaled_run([make_submit(**request) for request in requests]), alone, strict=True
    ):
        assert tokens == expected
        for one, other in zip(returned, scalings_alone, strict=True):
            assert one == (None if other is None else {name: pytest.approx(value) for name, value in other.items()})
    # Of the 44 steps, those with a prompt or unfrozen scalings, and those after an end.
    assert 10 < found < (core.counters["steps_total"] - steps) * 0.7
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
