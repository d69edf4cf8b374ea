"""Rendezvous hashing with bounded loads: who moves when servers come and go, and how uneven the load may become."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from trident_gateway.affinity import FEW_REQUESTS, key_of, most_requests, ranked
from trident_gateway.places import read_places
from trident_gateway.questions import read_question
from trident_gateway.upstreams import Upstreams

SERVERS = [f"10.0.0.{number}:8001" for number in range(1, 6)]
PINNED = ["c:1", "d:1", "b:1", "a:1"]
"""Where this conversation went when this was written: another order would lose all prefix caches at an upgrade."""
KEYS = [key_of("llm", "", f"conversation {number}") for number in range(2000)]


def best(servers: list[str]) -> list[str]:
    return [ranked(servers, key)[0] for key in KEYS]


def test_every_server_gets_its_share_whatever_the_order() -> None:
    shares = Counter(best(SERVERS))
    assert set(shares) == set(SERVERS)
    assert all(300 < share < 500 for share in shares.values())  # 400, and 5.6 standard deviations
    assert best(SERVERS[::-1]) == best(SERVERS)


def test_a_server_that_leaves_moves_only_its_own_keys_to_all_others() -> None:
    before, after = best(SERVERS), best(SERVERS[1:])
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {old for old, _ in moved} == {SERVERS[0]} and len(moved) == before.count(SERVERS[0])
    heirs = Counter(new for _, new in moved)
    assert set(heirs) == set(SERVERS[1:]) and max(heirs.values()) < 2 * min(heirs.values())


def test_a_server_that_comes_takes_one_in_n_from_all_others() -> None:
    before, after = best(SERVERS), best([*SERVERS, "10.0.0.9:8001"])
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {"10.0.0.9:8001"} and {old for old, _ in moved} == set(SERVERS)
    assert 250 < len(moved) < 420  # 333


def test_the_order_is_the_same_in_every_gateway_and_version() -> None:
    assert ranked(["a:1", "b:1", "c:1", "d:1"], key_of("llm", "salt", "Hello")) == PINNED


def test_parts_of_a_key_do_not_run_together() -> None:
    texts = [("a", "bc", ""), ("ab", "c", ""), ("abc", "", ""), ("", "abc", ""), ("a", "", "bc")]
    assert len({key_of(*text) for text in texts}) == len(texts)


@pytest.mark.parametrize("load_factor", [1.0, 1.25, 3.0])
def test_some_server_always_has_room(load_factor: float) -> None:
    for num_servers in range(1, 9):
        for running in range(200):
            most = most_requests(running, num_servers, load_factor)
            assert most * num_servers > running
            assert most <= max(FEW_REQUESTS, load_factor * (running + 1) / num_servers + 1)


def upstreams(*texts: str, **settings: Any) -> Upstreams:
    made = Upstreams(read_places(texts), **settings)
    for upstream in made.all:
        upstream.ready = True
    return made


def choose(servers: Upstreams, key: bytes, model: str = "llm", tried: tuple[str, ...] = ()) -> str | None:
    chosen = servers.choose(model, key, tried)
    return chosen.url if chosen else None


def test_one_conversation_of_many_requests_spills_over_in_its_own_order() -> None:
    servers = upstreams(",".join(SERVERS), load_factor=1.5)
    by_url = {upstream.url: upstream for upstream in servers.all}
    order, first_met = ranked(SERVERS, KEYS[0]), []
    for number in range(100):
        url = choose(servers, KEYS[0])
        assert url is not None
        if url not in first_met:
            first_met.append(url)
        by_url[url].running += 1
        assert by_url[url].running <= max(FEW_REQUESTS, 1.5 * (number + 1) / len(SERVERS) + 1)
    assert first_met == order[: len(first_met)] and len(first_met) >= 4
    assert by_url[order[0]].running == 30


def test_few_requests_stay_together() -> None:
    servers = upstreams(*SERVERS)
    first = choose(servers, KEYS[1])
    for upstream in servers.all:
        if upstream.url == first:
            upstream.running = FEW_REQUESTS - 1
    assert choose(servers, KEYS[1]) == first


def test_servers_that_are_not_ready_or_were_tried_or_lack_the_model_are_passed_over() -> None:
    servers = upstreams(*SERVERS)
    order, by_url = ranked(SERVERS, KEYS[2]), {upstream.url: upstream for upstream in servers.all}
    by_url[order[0]].ready = False
    assert choose(servers, KEYS[2]) == order[1] and choose(servers, KEYS[2], tried=(order[1],)) == order[2]
    for upstream in servers.all:
        upstream.ready = False
    assert choose(servers, KEYS[2]) == order[0], "when none is known to be ready, it may have become so"
    by_url[order[3]].models["poet"] = {"adapter": "poet"}
    assert choose(servers, KEYS[2], "poet") == order[3] and choose(servers, KEYS[2], "poet", (order[3],)) is None
    assert servers.models() == ["llm", "poet"]


def key(body: dict[str, Any], *, chat: bool = True) -> bytes:
    question = read_question(json.dumps({"model": "llm", **body}).encode(), chat=chat)
    return question.key(question.prompts[0])


def test_a_conversation_keeps_its_key_as_it_grows() -> None:
    system, first = {"role": "system", "content": "s" * 2000}, {"role": "user", "content": "Hi"}
    later = [system, first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert key({"messages": later}) == key({"messages": [system, first]})
    assert key({"messages": later}) != key({"messages": [first]}) != key({"messages": [{**first, "content": "Ho"}]})
    other_end = {**system, "content": "s" * 1999 + "t"}
    assert key({"messages": [other_end, first]}) != key({"messages": [system, first]})


def test_questions_about_one_long_document_share_a_key() -> None:
    document = "d" * 5000
    ask = [key({"messages": [{"role": "user", "content": document + question}]}) for question in ("Who?", "When?")]
    assert ask[0] == ask[1]
    plain = [key({"prompt": document + question}, chat=False) for question in ("Who?", "When?")]
    assert plain[0] == plain[1] != ask[0]


def test_model_and_salt_are_part_of_the_key() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    keys = [key({"messages": messages, **extra}) for extra in ({}, {"model": "poet"}, {"cache_salt": "tenant"})]
    assert len(set(keys)) == 3 and key({"messages": messages, "cache_salt": None}) == keys[0]
