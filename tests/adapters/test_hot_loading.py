"""Adapters come, change and go while requests run: every request keeps what it began with, and nothing is left."""

from __future__ import annotations

import gc
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.adapters.helpers import NEW_TOKENS, AdaptedModel, make_core, make_submit, prompt_of, run
from tests.fakes.peft_adapters import greedy, write_adapter
from trident_llm.adapters.adapter import Adapter
from trident_llm.engine.engine import EngineCore
from trident_llm.errors import NotFound, TridentError
from trident_llm.metrics_catalog import ENGINE_COUNTERS, ENGINE_GAUGES
from trident_llm.protocol import SampleStart, Submit
from trident_llm.server.metric_values import engine_values

NUM_VERSIONS, NUM_PROMPTS, NUM_TOKENS = 5, 6, 24


@dataclass(frozen=True)
class Versions:
    """Adapters that differ, as folders below the root, and what PEFT says with each to each prompt."""

    root: Path
    prompts: list[list[int]]
    expected: list[list[list[int]]]
    """By version and prompt."""


@pytest.fixture(scope="module")
def versions(adapted: AdaptedModel, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    root = tmp_path_factory.mktemp("versions")
    prompts = [prompt_of(6 + 5 * index, seed=500 + index) for index in range(NUM_PROMPTS)]
    oracles = [
        write_adapter(adapted.base, root / f"v{index}", seed=40 + index, r=2 + index) for index in range(NUM_VERSIONS)
    ]
    expected = [[greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts] for oracle in oracles]
    assert len({str(of_version) for of_version in expected}) == NUM_VERSIONS
    return Versions(root, prompts, expected)


@pytest.fixture
def core(adapted: AdaptedModel, versions: Versions, tmp_path: Path) -> Iterator[EngineCore]:
    core = make_core(adapted, adapters="", adapter_root=str(versions.root), max_loras=3, max_cpu_loras=4)
    yield core
    core.close()


def wait(core: EngineCore, reply: Future[dict[str, Any]]) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while not reply.done() and time.monotonic() < deadline:
        core.poll()
        time.sleep(0.001)
    return reply.result(0)


def load(core: EngineCore, name: str, version: int, **arguments: Any) -> dict[str, Any]:
    return wait(core, core.run_command("load_adapter", {"name": name, "path": f"v{version}", **arguments}))


def copies_of(core: EngineCore) -> Path:
    """Where the engine keeps its copies of adapters."""
    assert core.adapters is not None
    return core.adapters._journal.folder_of(1).parent


def folders(core: EngineCore) -> set[str]:
    return {path.name for path in copies_of(core).iterdir() if path.is_dir()}


def test_a_running_request_keeps_its_generation_and_new_ones_get_the_new(core: EngineCore, versions: Versions) -> None:
    load(core, "x", 0)
    old = make_submit(versions.prompts[0], "x", max_tokens=NUM_TOKENS)
    core.add(old)
    tokens = core.step()[0].token_ids
    assert load(core, "x", 1)["generation"] == 2
    new = make_submit(versions.prompts[0], "x", max_tokens=NUM_TOKENS)
    assert len(folders(core)) == 2
    found = run(core, [new])
    assert tokens + found[old.request_id] == versions.expected[0][0]
    assert found[new.request_id] == versions.expected[1][0]
    assert folders(core) == {"2"}, "the old one's files are gone with its last user"


def test_blocks_of_the_adapter_before_are_not_found_again(core: EngineCore, versions: Versions) -> None:
    """The name is the same, what it computes is not."""
    prompt = versions.prompts[-1]
    for version in (0, 1, 0):
        load(core, "x", version)
        for cached in (False, True):
            submit = make_submit(prompt, "x", max_tokens=NUM_TOKENS)
            before = core.stats()["prefix_cache_hit_tokens_total"]
            assert run(core, [submit])[submit.request_id] == versions.expected[version][-1]
            assert (core.stats()["prefix_cache_hit_tokens_total"] > before) == cached


def test_unloading_takes_the_name_at_once_and_the_files_with_the_last_user(
    core: EngineCore, versions: Versions
) -> None:
    load(core, "x", 2)
    running = make_submit(versions.prompts[1], "x", max_tokens=NUM_TOKENS)
    core.add(running)
    tokens = core.step()[0].token_ids
    assert wait(core, core.run_command("unload_adapter", {"name": "x"})) == {"name": "x", "generation": 1, "users": 1}
    with pytest.raises(NotFound, match="'x' is not loaded; loaded: none"):
        core.add(make_submit([5], "x"))
    with pytest.raises(NotFound, match="name: 'x' is not loaded"):
        wait(core, core.run_command("unload_adapter", {"name": "x"}))
    assert folders(core) == {"1"}
    assert core.stats()["adapter_usage"]["x"] == {"requests": 1, "generated_tokens": 1}
    assert tokens + run(core, [])[running.request_id] == versions.expected[2][1]
    assert folders(core) == set()
    assert core.stats()["adapter_usage"] == {"_other": {"requests": 0, "generated_tokens": 0}}
    assert wait(core, core.run_command("list_adapters", {})) == {"adapters": [], "mixes": [], "slots": 3}


def test_statistics_have_every_figure(core: EngineCore, versions: Versions) -> None:
    load(core, "x", 0)
    load(core, "y", 1)
    run(core, [make_submit(versions.prompts[0], "x", max_tokens=5), make_submit(versions.prompts[1], "x:0.5,y:0.5")])
    values = engine_values({**core.stats(), "histograms": core.request_metrics.to_dict()})
    assert {key for spec in (*ENGINE_GAUGES, *ENGINE_COUNTERS) for key in spec.series} <= values.keys()
    named = {name: values[name] for name in ("adapters_loaded", "mixes_loaded", "adapter_slots_total")}
    assert named == {"adapters_loaded": 2, "mixes_loaded": 0, "adapter_slots_total": 3}
    assert values["adapter_slots_used"] == 2 and values["adapter_slots_bytes"] > 0
    assert (values["adapter_requests_total.x"], values["adapter_generated_tokens_total.x"]) == (2, 5 + NEW_TOKENS)
    assert (values["adapter_requests_total.y"], values["adapter_generated_tokens_total.y"]) == (1, NEW_TOKENS)
    assert values["quantization_method.none"] == 1 and values["quantized_bits"] == 0


def test_an_aborted_request_lets_go_of_its_adapter(core: EngineCore, versions: Versions) -> None:
    load(core, "x", 0)
    submit = make_submit(versions.prompts[0], "x", samples=[SampleStart(index=index) for index in range(3)])
    core.add(submit)
    core.step()
    core.abort(submit.request_id, 1)
    wait(core, core.run_command("unload_adapter", {"name": "x"}))
    core.check_integrity()
    core.abort(submit.request_id)
    core.step()
    core.check_integrity()
    assert folders(core) == set()


class Changes:
    """Random loads, replacements and unloads, one at a time. ``current`` has the version behind each name."""

    def __init__(self, core: EngineCore, choose: random.Random) -> None:
        self.current: dict[str, int] = {}
        self.num_done = 0
        self._core = core
        self._choose = choose
        self._reply: Future[dict[str, Any]] | None = None
        self._loading = ("", 0)

    def advance(self) -> None:
        """Take note of what has happened and begin with the next."""
        self._core.poll()
        if self._reply is not None and self._reply.done():
            self._reply.result()
            self.current[self._loading[0]] = self._loading[1]
            self._reply, self.num_done = None, self.num_done + 1
        if self._reply is None:
            name, version = self._choose.choice("xyzw"), self._choose.randrange(NUM_VERSIONS)
            if name in self.current and self._choose.random() < 0.3:
                del self.current[name]
                self._core.run_command("unload_adapter", {"name": name}).result(0)
                self.num_done += 1
            else:
                self._loading = name, version
                self._reply = self._core.run_command("load_adapter", {"name": name, "path": f"v{version}"})

    def end(self) -> None:
        """Leave no name behind."""
        if self._reply is not None:
            self.current[wait(self._core, self._reply)["name"]] = self._loading[1]
        for name in self.current:
            self._core.run_command("unload_adapter", {"name": name}).result(0)


@dataclass
class Stream:
    submit: Submit
    expected: list[int]
    tokens: list[int] = field(default_factory=list)


def test_100_changes_beside_32_streams(core: EngineCore, versions: Versions) -> None:
    """No wrong text, no failed request, and nothing is left at the end."""
    choose = random.Random(0)
    changes, streams, num_checked = Changes(core, choose), dict[str, Stream](), 0
    while changes.num_done < 100 or streams:
        if changes.num_done < 100:
            changes.advance()
            while len(streams) < 32 and changes.current:
                stream = new_stream(choose, changes.current, versions)
                core.add(stream.submit)
                streams[stream.submit.request_id] = stream
        for delta in core.step():
            assert not delta.error, delta.error
            streams[delta.request_id].tokens += delta.token_ids
            if delta.finish_reason:
                stream = streams.pop(delta.request_id)
                assert stream.tokens == stream.expected
                num_checked += 1
        core.check_integrity()
    assert num_checked > 100
    assert core.stats()["kv_blocks_used"] == 0
    changes.end()
    core.check_integrity()
    assert folders(core) == set()
    own = [thing for thing in gc.get_objects() if type(thing) is Adapter and thing.folder.parent == copies_of(core)]
    assert not [adapter for adapter in own if adapter.weights is not None], "weights of adapters that are gone"


def new_stream(choose: random.Random, current: dict[str, int], versions: Versions) -> Stream:
    name, prompt = choose.choice(sorted(current)), choose.randrange(NUM_PROMPTS)
    num_tokens = choose.randint(3, NUM_TOKENS)
    submit = make_submit(versions.prompts[prompt], name, max_tokens=num_tokens)
    return Stream(submit, versions.expected[current[name]][prompt][:num_tokens])


def test_memory_of_adapters_that_are_gone_is_given_back(adapted: AdaptedModel, tmp_path: Path) -> None:
    write_adapter(adapted.base, tmp_path / "large", seed=1, r=600)
    core = make_core(adapted, adapters="", adapter_root=str(tmp_path), max_lora_rank=600, max_loras=1)

    def load_and_use() -> int:
        described = wait(core, core.run_command("load_adapter", {"name": "large", "path": "large"}))
        submit = make_submit([7, 8, 9], "large", max_tokens=2)
        run(core, [submit])
        return int(described["bytes"])

    num_bytes = max(load_and_use() for _ in range(5))
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(30):
        load_and_use()
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 5 * num_bytes
    core.close()


def test_failed_loads_change_nothing_for_running_requests(
    core: EngineCore, versions: Versions, adapted: AdaptedModel
) -> None:
    load(core, "x", 0)
    submit = make_submit(versions.prompts[2], "x", max_tokens=NUM_TOKENS)
    core.add(submit)
    tokens = core.step()[0].token_ids
    shutil.copytree(versions.root / "v1", versions.root / "broken", dirs_exist_ok=True)
    (versions.root / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TridentError, match="cannot be read"):
        wait(core, core.run_command("load_adapter", {"name": "x", "path": "broken"}))
    tokens += run(core, [])[submit.request_id]
    assert tokens == versions.expected[0][2]
    assert folders(core) == {"1"}


def test_an_engine_that_takes_over_has_the_same_adapters(
    adapted: AdaptedModel, versions: Versions, tmp_path: Path
) -> None:
    """Also the generation that a running request began with: it goes on with it, though the name has moved on."""
    settings = {"adapters": f"s={versions.root / 'v4'}", "adapter_root": str(versions.root)}
    first = make_core(adapted, adapter_folder=tmp_path / "copies", **settings)
    load(first, "x", 0)
    request = make_submit(versions.prompts[0], "x", max_tokens=NUM_TOKENS)
    first.add(request)
    deltas = [first.step()[0] for _ in range(5)]
    assert deltas[0].adapter == "x@2:1.0" and not deltas[1].adapter
    load(first, "x", 1, pinned=True)
    wait(first, first.run_command("unload_adapter", {"name": "s"}))
    first.close()

    second = make_core(adapted, adapter_folder=tmp_path / "copies", **settings)
    (described,) = wait(second, second.run_command("list_adapters", {}))["adapters"]
    assert (described["name"], described["generation"], described["pinned"]) == ("x", 3, True), "s stays unloaded"
    tokens = [token for delta in deltas for token in delta.token_ids]
    resubmitted = make_submit(
        versions.prompts[0], deltas[0].adapter, max_tokens=NUM_TOKENS,
        samples=[SampleStart(index=0, output_ids=tokens)],
    )  # fmt: skip
    fresh = make_submit(versions.prompts[0], "x", max_tokens=NUM_TOKENS)
    found = run(second, [resubmitted, fresh])
    assert tokens + found[resubmitted.request_id] == versions.expected[0][0]
    assert found[fresh.request_id] == versions.expected[1][0]
    assert load(second, "y", 0)["generation"] == 4
    second.close()


def test_an_old_generation_is_kept_for_a_while_after_a_restart(
    adapted: AdaptedModel, versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"adapters": "", "adapter_root": str(versions.root), "adapter_folder": tmp_path / "copies"}
    first = make_core(adapted, **settings)
    load(first, "x", 0)
    first.add(make_submit(versions.prompts[0], "x"))
    load(first, "x", 1)
    first.close()
    monkeypatch.setattr("trident_llm.adapters.store.GRACE_SECONDS", 0.3)
    second = make_core(adapted, **settings)
    assert folders(second) == {"1", "2"}
    second.check_integrity()
    time.sleep(0.4)
    second.poll()
    second.check_integrity()
    assert folders(second) == {"2"}
    second.close()
