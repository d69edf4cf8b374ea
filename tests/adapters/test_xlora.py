"""X-LoRA through the whole engine equals PEFT's XLoraModel, which knows no cache: paged, cached, chunked, batched."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.adapters.helpers import AdaptedModel, make_submit, prompt_of, run
from tests.adapters.mixes import CONFIGS, MEMBERS, NEW_TOKENS, TestedMix
from tests.fakes.peft_adapters import greedy
from tests.fakes.peft_mixes import greedy_without_cache
from trident_llm.errors import BadRequest
from trident_llm.protocol import SampleStart


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


def test_samples_of_a_request_share_both_passes(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    mix, prompt = mixes["dense"], prompt_of(19, seed=6)
    core = mix.core(adapted)
    submit = make_submit(prompt, max_tokens=NEW_TOKENS, samples=[SampleStart(index=index) for index in range(3)])
    tokens = run(core, [submit])[submit.request_id]
    assert sorted(tokens) == sorted(greedy_without_cache(mix.oracle, prompt, NEW_TOKENS) * 3)
    usage = {name: tuple(used.values()) for name, used in core.stats()["adapter_usage"].items()}
    assert usage == {"xlora": (1, 3 * NEW_TOKENS), **dict.fromkeys((*MEMBERS, "_other"), (0, 0))}
    core.close()


def test_a_prompt_must_leave_room_for_both_passes(mixes: dict[str, TestedMix], adapted: AdaptedModel) -> None:
    core = mixes["dense"].core(adapted, max_num_blocks=9, max_model_len=72)
    with pytest.raises(BadRequest, match=r"at most 31 .*two passes"):
        core.add(make_submit(prompt_of(32, seed=1)))
    submit = make_submit(prompt_of(25, seed=1), max_tokens=40)
    assert len(run(core, [submit])[submit.request_id]) == 7, "to the end of what fits"
    core.close()
