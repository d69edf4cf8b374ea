"""Requests with adapters through the whole engine: tokens equal PEFT's, whatever runs beside them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.adapters.helpers import NEW_TOKENS, AdaptedModel, make_core, make_submit, prompt_of, run
from tests.fakes.peft_adapters import greedy, peft_blend
from trident_llm import EngineConfig
from trident_llm.engine.engine import EngineCore
from trident_llm.errors import BadRequest, NotFound
from trident_llm.protocol import SampleStart

NAMES = ("", "a", "b", "c", "d")


@pytest.fixture(scope="module")
def cases(adapted: AdaptedModel) -> list[tuple[list[int], str, list[int]]]:
    """32 requests: prompt, adapter or none, PEFT's greedy tokens."""
    found = []
    for index in range(32):
        name, prompt = NAMES[index % 5], prompt_of(5 + 3 * index % 40, seed=index)
        model = adapted.oracles[name] if name else adapted.base
        found.append((prompt, name, greedy(model, prompt, NEW_TOKENS)))
    return found


def check(core: EngineCore, cases: list[tuple[list[int], str, list[int]]], **options: Any) -> None:
    submits = [make_submit(prompt, name) for prompt, name, _ in cases]
    tokens = run(core, submits, **options)
    for submit, (_, name, expected) in zip(submits, cases, strict=True):
        assert tokens[submit.request_id] == expected, name
    assert core.stats()["kv_blocks_used"] == 0


def test_adapters_change_the_tokens(adapted: AdaptedModel, cases: list[tuple[list[int], str, list[int]]]) -> None:
    for prompt, name, expected in cases:
        assert not name or expected != greedy(adapted.base, prompt, NEW_TOKENS)


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 64}, False),
        ({"max_num_blocks": 30, "max_num_batched_tokens": 64, "max_model_len": 200}, True),
        ({"max_num_blocks": 30, "prefix_caching": False, "max_model_len": 200}, True),
    ],
    ids=["whole", "chunked", "small-pool", "small-pool-uncached"],
)
def test_32_mixed_requests_equal_peft(
    adapted: AdaptedModel, cases: list[tuple[list[int], str, list[int]]], settings: dict[str, Any], preempts: bool
) -> None:
    core = make_core(adapted, **settings)
    check(core, cases)
    stats = core.stats()
    assert (stats["preemptions_total"] > 0) == preempts
    assert stats["adapter_slot_loads_total"] == 4 and stats["adapter_reads_total"] == 0
    core.close()


@pytest.mark.parametrize("max_loras", [1, 2])
def test_more_adapters_than_slots_and_host_memory(
    adapted: AdaptedModel, cases: list[tuple[list[int], str, list[int]]], max_loras: int
) -> None:
    core = make_core(adapted, max_loras=max_loras, max_cpu_loras=max_loras)
    check(core, cases)
    stats = core.stats()
    assert stats["adapter_slot_loads_total"] >= 4
    assert stats["adapter_reads_total"] >= 4 - max_loras, "some must have been read again"
    core.close()


def test_with_lookahead(adapted: AdaptedModel, cases: list[tuple[list[int], str, list[int]]]) -> None:
    core = make_core(adapted, max_loras=2, max_cpu_loras=2)
    core._lookahead = True
    check(core, cases, steps_between=2)
    core.close()


def test_a_blend_equals_peft(adapted: AdaptedModel) -> None:
    core = make_core(adapted)
    weights = {"a": 0.7, "b": -0.4, "d": 0.9}
    oracle = peft_blend(adapted.base, {adapted.path(name): weight for name, weight in weights.items()})
    prompts = [prompt_of(20, seed=90 + i) for i in range(4)]
    spec = ",".join(f"{name}:{weight}" for name, weight in weights.items())
    submits = [make_submit(prompt, spec) for prompt in prompts] + [make_submit(prompts[0], "a")]
    tokens = run(core, submits)
    for submit, prompt in zip(submits, prompts, strict=False):
        expected = greedy(oracle, prompt, NEW_TOKENS)
        assert expected != greedy(adapted.base, prompt, NEW_TOKENS)
        assert tokens[submit.request_id] == expected
    core.close()


def test_a_blend_of_nothing_is_the_base(adapted: AdaptedModel) -> None:
    core = make_core(adapted)
    prompt = prompt_of(12, seed=1)
    submits = [make_submit(prompt, "a:0,b:0"), make_submit(prompt)]
    tokens = list(run(core, submits).values())
    assert tokens[0] == tokens[1] == greedy(adapted.base, prompt, NEW_TOKENS)
    core.close()


def test_the_prefix_cache_tells_adapters_weights_and_salts_apart(adapted: AdaptedModel) -> None:
    core = make_core(adapted)
    prompt = prompt_of(40, seed=5)

    def cached(adapter: str, **fields: Any) -> int:
        core.add(make_submit(prompt, adapter, max_tokens=1, **fields))
        (delta,) = core.step()
        return delta.num_cached_tokens

    specs = ("", "a", "b", "a:0.5", "a:0.5,b:0.5", "a:0.25,b:0.75")
    assert [cached(spec) for spec in specs] == [0] * 6
    assert [cached(spec) for spec in specs] == [32] * 6
    assert cached("b:0.5,a:0.5") == 32, "the order of terms is of no account"
    assert cached("a:1.0") == 32
    assert cached("a", cache_salt="x") == 0
    core.close()


def test_samples_of_a_request_share_its_adapter(adapted: AdaptedModel) -> None:
    core = make_core(adapted)
    prompt = prompt_of(13, seed=7)
    submit = make_submit(prompt, "c", samples=[SampleStart(index=index) for index in range(3)])
    tokens = run(core, [submit])[submit.request_id]
    expected = greedy(adapted.oracles["c"], prompt, NEW_TOKENS)
    assert sorted(tokens) == sorted(expected * 3)
    core.close()


def test_unknown_adapters_are_not_found(adapted: AdaptedModel) -> None:
    core = make_core(adapted, max_loras=2)
    with pytest.raises(NotFound, match="adapter: 'nobody' is not loaded; loaded: a, b, c, d"):
        core.add(make_submit([1, 2], "a:0.5,nobody:0.5"))
    with pytest.raises(BadRequest, match=r"a blend of 3 adapters is not allowed; at most max_loras \(2\)"):
        core.add(make_submit([1, 2], "a,b,c"))
    with pytest.raises(BadRequest, match="adapter: 'a' comes twice"):
        core.add(make_submit([1, 2], "a,a"))
    assert not core.has_work()
    core.check_integrity()
    plain = EngineCore(EngineConfig(model=str(adapted.folder), dtype="fp32", device="cpu", max_num_blocks=64))
    with pytest.raises(NotFound, match="no room for adapters"):
        plain.add(make_submit([1, 2], "a"))


def test_sequences_without_slots_do_not_hold_others_up_and_get_their_turn(adapted: AdaptedModel) -> None:
    core = make_core(adapted, max_loras=1)
    first = make_submit(prompt_of(9, seed=1), "a", max_tokens=150)
    blocked = make_submit(prompt_of(9, seed=2), "b", max_tokens=3)
    core.add(first)
    core.step()
    core.add(blocked)
    others = [make_submit(prompt_of(9, seed=3 + i), "a" if i % 2 else "", max_tokens=60) for i in range(8)]
    finished: list[str] = []
    for step in range(600):
        if step % 20 == 0 and others:
            core.add(others.pop(0))
        finished += [delta.request_id for delta in core.step() if delta.finish_reason]
        core.check_integrity()
        if not core.has_work():
            break
    late = [submit.request_id for submit in (first, blocked)]
    assert len(finished) == 10
    assert finished[0] not in late, "others went before the one that waits"
    assert finished[-1] != blocked.request_id, "but not for ever"
    core.close()
