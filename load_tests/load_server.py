"""The server of a load run: one of its own or one that runs already, and what llm_admin says of it each second."""

from __future__ import annotations

import argparse
import csv
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from client_pool import BenchFailed
from engine_arguments import engine_settings
from load_plan import Plan
from load_records import SERVER
from profiles import Profile
from random_adapters import write_random_mix
from served_model import ServedModel, environment_of_checkout
from server_workloads import Prompts

from trident_client import BadRequest, TridentClient, TridentError
from trident_llm.launch.default_model import default_model

STATS = (
    "kv_blocks_used",
    "kv_blocks_cached",
    "kv_blocks_total",
    "running_requests",
    "waiting_requests",
    "output_tokens_total",
    "prompt_tokens_total",
    "prefix_cache_query_tokens_total",
    "prefix_cache_hit_tokens_total",
    "preemptions_total",
    "engine_restarts",
)
"""Columns of the file ``SERVER`` after the wall clock's ``time``."""
STATS_SECONDS = 10.0
"""After which a look at the statistics has failed."""
WHOLE_SECONDS = 20.0
"""How long the engine may take to give everything back after the last request."""
MEMBERS, RANK, TOP_K = 4, 8, 2
"""Of the random adapters and the mix of them that profiles with adapters get."""
_HELD = ("kv_blocks_used", "running_requests", "waiting_requests")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where the server is; ``served`` is None when it was there before."""

    grpc: str
    http: str
    admin_token: str
    served: ServedModel | None

    def client(self) -> TridentClient:
        return TridentClient(self.grpc, admin_token=self.admin_token)


@contextmanager
def load_server(args: argparse.Namespace, profiles: Mapping[str, Profile]) -> Iterator[Server]:
    """The server that ``--host`` names, or one started for the runs, with random adapters if a profile wants some."""
    if args.host is not None:
        yield Server(grpc=args.host, http=args.http, admin_token=args.admin_token, served=None)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="load")))
        settings = engine_settings(args)
        if any("adapter_mix" in profile.users for profile in profiles.values()):
            model = args.model or default_model()
            mix = write_random_mix(folder / "mix", model, members=MEMBERS, rank=RANK, top_k=TOP_K)
            settings = {"xlora": str(mix), "max_loras": str(MEMBERS), "max_lora_rank": str(RANK), **settings}
        arguments = [f"--set={key}={value}" for key, value in settings.items()]
        if args.doors:
            arguments.append(f"--doors={args.doors}")
        if args.model:
            arguments += ["--model", args.model]
        served = stack.enter_context(ServedModel(arguments, environment_of_checkout(), folder))
        served.wait(args.start_timeout)
        token = settings.get("admin_token", args.admin_token)
        yield Server(grpc=served.address, http=served.http_address, admin_token=token, served=served)


def make_plan(server: Server, profile: Profile) -> Plan:
    """What users must know of the server. Raises ``BenchFailed`` when it does not say."""
    try:
        with server.client() as client:
            prompts = Prompts.of_server(client)
            adapters = _adapters(client)
            has_chat_template = _has_chat_template(client)
    except TridentError as error:
        raise BenchFailed(f"the server at {server.grpc}: {error}") from None
    names = [adapter["name"] for adapter in adapters["adapters"]]
    if "adapter_mix" in profile.users and not names:
        print(f"the server at {server.grpc} has no adapters: users of adapters ask without", flush=True)
    return Plan(
        profile=profile,
        seed=random.getrandbits(32),
        grpc=server.grpc,
        http=server.http,
        alphabet=prompts.alphabet,
        num_added=prompts.num_added,
        has_chat_template=has_chat_template,
        adapters=names,
        has_mix=bool(adapters["mixes"]),
    )


def _adapters(client: TridentClient) -> dict[str, Any]:
    try:
        return client.admin("list_adapters")
    except BadRequest:
        return {"adapters": [], "mixes": []}  # its settings leave no room for adapters


def _has_chat_template(client: TridentClient) -> bool:
    try:
        client.generate([{"role": "user", "content": "a"}], stream=False, max_tokens=1, timeout=60)
    except BadRequest:
        return False
    return True


class StatsWatch:
    """Writes the engine's statistics to ``folder`` each second. Use it in a ``with`` statement."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._client = server.client()
        self._file = (folder / SERVER).open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(("time", *STATS))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StatsWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()
        self._file.close()

    def wait_until_whole(self) -> dict[str, int]:
        """What the engine still holds after ``WHOLE_SECONDS``: empty as soon as it holds nothing."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while True:
            stats = self._client.admin("stats", timeout=STATS_SECONDS)
            held = {name: stats[name] for name in _HELD if stats[name]}
            if not held or time.monotonic() > deadline:
                return held
            time.sleep(0.2)

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self._look()
        self._look()

    def _look(self) -> None:
        """A server that does not answer leaves a line without values."""
        stats: Mapping[str, Any] = {}
        try:
            stats = self._client.admin("stats", timeout=STATS_SECONDS)
        except TridentError as error:
            print(f"statistics: {error}", flush=True)
        self._rows.writerow((round(time.time(), 3), *(stats.get(name, "") for name in STATS)))
        self._file.flush()
