"""Counts of requests that all workers of a gateway see, and the bound on a server's load that they keep together."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing

from trident_gateway.affinity import FEW_REQUESTS, ranked
from trident_gateway.places import Place, read_places
from trident_gateway.running import Running, clear, shared_memory
from trident_gateway.upstreams import Upstreams

URLS = ["a:1", "b:1", "c:1"]
NONE = dict.fromkeys(URLS, 0)
KEY = b"conversation"


def workers(count: int = 3) -> tuple[object, list[Running]]:
    memory = shared_memory(multiprocessing.get_context("spawn"), count)
    return memory, [Running(memory, worker) for worker in range(count)]


def test_a_worker_sees_what_all_have() -> None:
    _, (one, two, three) = workers()
    one.put("a:1", 3)
    two.put("b:1", 2)
    two.put("a:1", 1)
    assert three.of_all(NONE) == {"a:1": 4, "b:1": 2, "c:1": 0}
    assert one.of_all({"a:1": 3, "c:1": 1}) == {"a:1": 4, "c:1": 1}, "its own come from itself"
    two.put("a:1", 0)
    one.put("a:1", 70_000)
    assert three.of_all(NONE) == {"a:1": 65_535, "b:1": 2, "c:1": 0}


def test_servers_that_come_and_go_use_no_more_places() -> None:
    _, (one, two, _) = workers()
    urls = [f"10.0.0.1:{number}" for number in range(5000)]
    for url in urls:
        one.put(url, 1)
        assert two.of_all({url: 0}) == {url: 1}
        one.put(url, 0)
        one.put(url, 0)
    assert not any(two.of_all(dict.fromkeys(urls, 0)).values())


def test_a_row_that_is_full_stays_right() -> None:
    _, (one, two, _) = workers()
    urls = [f"10.0.0.1:{number}" for number in range(1100)]
    for url in urls:
        one.put(url, 1)
    assert sum(two.of_all(dict.fromkeys(urls, 0)).values()) == 1023
    for url in urls:
        one.put(url, 0)
    one.put("a:1", 5)
    assert two.of_all({**dict.fromkeys(urls, 0), "a:1": 0}) == {**dict.fromkeys(urls, 0), "a:1": 5}


def test_counts_of_a_worker_that_died_are_forgotten() -> None:
    memory, (one, two, three) = workers()
    for worker in (one, two):
        worker.put("a:1", 2)
    clear(memory, 0)
    assert three.of_all(NONE)["a:1"] == 2
    Running(memory, 0).put("a:1", 1)
    assert three.of_all(NONE)["a:1"] == 3


def test_alone_there_is_nothing_to_add() -> None:
    alone = Running()
    alone.put("a:1", 2)
    assert alone.of_all({"a:1": 2}) == {"a:1": 2}


def _count_up(memory: object, worker: int) -> None:
    running = Running(memory, worker)
    for count in range(1, 2001):
        running.put("a:1", count)
        assert running.of_all({"a:1": count})["a:1"] >= count
    running.put("a:1", 1000 + worker)


def test_processes_share_it() -> None:
    context = multiprocessing.get_context("spawn")
    memory = shared_memory(context, 3)
    processes = [context.Process(target=_count_up, args=(memory, worker)) for worker in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert Running(memory, 2).of_all(NONE)["a:1"] == 2001


def upstreams(running: Running | None = None) -> Upstreams:
    made = Upstreams(read_places(URLS), running=running)
    for upstream in made.all:
        upstream.ready = True
    return made


def test_workers_bound_a_servers_load_together() -> None:
    _, running = workers()
    gateways = [upstreams(each) for each in running]
    first, second, _ = ranked(URLS, KEY)
    with contextlib.ExitStack() as stack:
        for number in range(FEW_REQUESTS):
            chosen = gateways[number % 3].choose("llm", KEY, ())
            assert chosen is not None and chosen.url == first
            stack.enter_context(chosen.carrying())
        for each in gateways:
            chosen = each.choose("llm", KEY, ())
            assert chosen is not None and chosen.url == second
    assert [each.choose("llm", KEY, ()).url for each in gateways] == [first] * 3  # type: ignore[union-attr]


def test_a_server_that_comes_back_is_known_with_what_it_still_runs() -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]

    async def names(place: Place) -> list[str]:
        return [f"{host}:1" for host in hosts]

    async def check() -> None:
        servers = Upstreams(read_places(["dns:servers.test:1"]), look_up=names)
        await servers.find()
        before = {upstream.url: upstream for upstream in servers.all}
        with before["127.0.0.2:1"].carrying():
            del hosts[1]
            await servers.find()
            await servers.refresh()
            assert [upstream.url for upstream in servers.all] == ["127.0.0.1:1"]
            hosts.append("127.0.0.2")
            await servers.find()
            after = {upstream.url: upstream for upstream in servers.all}
            assert after == before and after["127.0.0.2:1"].running == 1
        await servers.close()

    asyncio.run(check())
