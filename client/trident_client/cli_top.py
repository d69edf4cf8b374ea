"""``trident top``: what a server does right now, from its metrics and its admin door, in a terminal that refreshes."""

from __future__ import annotations

import argparse
import collections
import http.client
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cli_output import MakeCommand
from .client import TridentClient
from .errors import BadRequest, Overloaded, TridentError
from .metrics_text import Scrape, parse_metrics, quantile, since

WINDOW = 30.0
"""Seconds that rates and percentiles look back, at most."""
_HOME, _CLEAR_BELOW, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_LATENCIES = (
    ("first token", "time_to_first_token_seconds"),
    ("per token", "time_per_output_token_seconds"),
    ("whole request", "e2e_request_latency_seconds"),
    ("in the queue", "request_queue_time_seconds"),
)
_MAX_ADAPTERS = 8
_ADAPTER_COUNTERS = ("adapter_requests_total", "adapter_generated_tokens_total")
_OTHERS = "_other"
"""Under this name the metrics have all adapters beyond their limit."""
_STEP_TOKENS = ("iteration_tokens_total_sum", "iteration_tokens_total_count")


def add_top_command(commands: Any, make: MakeCommand) -> None:
    """Add ``top`` to the subcommands of a parser."""
    top = make(commands, "top", "watch a server: streams, tokens/s, KV pool, cache, adapters, latencies", _top)
    url = "http://localhost:8002/metrics"
    top.add_argument("--metrics-url", default=url, metavar="URL", help="the metrics endpoint (%(default)s)")
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (%(default)s)")
    top.add_argument("--once", action="store_true", help="print what there is after one interval, and end")
    top.add_argument("--admin-token", default="", metavar="TEXT", help="the server's admin_token, where it has one")


def _top(client: TridentClient, arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= WINDOW:
        raise BadRequest(f"--interval: {arguments.interval:g} is not allowed; give seconds from 0.1 to {WINDOW:g}")
    look = _Looker(client, arguments.metrics_url, arguments.timeout or 5.0)
    if arguments.once:
        look()
        time.sleep(arguments.interval)
        print(look(), flush=True)
        return 0
    print(_ALTERNATE, end="", flush=True)
    try:
        while True:
            _show(look())
            time.sleep(arguments.interval)
    finally:
        print(_NORMAL, end="", flush=True)


def _show(frame: str) -> None:
    """Paint ``frame`` over the last one, cut to the terminal."""
    size = shutil.get_terminal_size()
    lines = [line[: size.columns] for line in frame.splitlines()[: size.lines - 1]]
    sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in lines) + _CLEAR_BELOW)
    sys.stdout.flush()


class _Looker:
    """Each call makes a frame from a new scrape and those before it."""

    def __init__(self, client: TridentClient, metrics_url: str, timeout: float) -> None:
        self._client = client
        self._url = metrics_url
        self._timeout = timeout
        self._scrapes: collections.deque[Scrape] = collections.deque()

    def __call__(self) -> str:
        now = parse_metrics(self._fetch(), time.monotonic())
        self._scrapes.append(now)
        while now.time - self._scrapes[0].time > WINDOW:
            self._scrapes.popleft()
        stats = self._ask(lambda: self._client.admin("stats", timeout=self._timeout))
        adapters = self._ask(lambda: self._client.list_adapters(timeout=self._timeout))
        return frame(self._scrapes[0], now, stats, adapters.get("adapters", []))

    def _fetch(self) -> str:
        try:
            with urllib.request.urlopen(self._url, timeout=self._timeout) as response:
                return str(response.read().decode(errors="replace"))
        except ValueError as error:
            raise BadRequest(f"--metrics-url: {self._url!r}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Overloaded(f"no metrics at {self._url}: {error}") from None

    def _ask(self, question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Without an admin door, its token, or adapters, the metrics say enough."""
        try:
            return question()
        except TridentError:
            return {}


def frame(before: Scrape, now: Scrape, stats: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> str:
    """What to show; rates and percentiles are of the time between the two scrapes."""
    values, seconds = now.values, max(now.time - before.time, 1e-9)

    def rate(name: str) -> float:
        return max(values[name] - before.values[name], 0.0) / seconds

    state = "ready" if values["engine_ready"] else "DOWN"
    device = f"{stats['device']}, {stats['dtype']}" if "device" in stats else "-"
    queries, hits = rate("prefix_cache_query_tokens_total"), rate("prefix_cache_hit_tokens_total")
    lines = [
        f"engine    {state}, {values['engine_restarts_total']:.0f} restarts   {device}   {_weights(values)}",
        f"requests  {values['running_requests']:.0f} running, {values['waiting_requests']:.0f} waiting"
        f"   {rate('requests_accepted_total'):.1f}/s in, {rate('requests_finished_total'):.1f}/s done, "
        f"{rate('requests_refused_total'):.1f}/s refused, {rate('preemptions_total'):.1f}/s preempted",
        f"tokens    {rate('output_tokens_total'):,.1f}/s out, {rate('prompt_tokens_total'):,.1f}/s in   "
        f"{rate('steps_total'):,.1f} steps/s{_step_tokens(before, now)}",
        f"doors     {values['doors']:.0f} with {values['door_requests']:.0f} requests, "
        f"{rate('door_responses_total'):,.1f} responses/s",
        f"KV pool   {_bar(values['kv_blocks_used'], values['kv_blocks_total'])}, "
        f"{values['kv_blocks_cached']:,.0f} cached",
    ]
    if values["host_blocks_total"]:
        lines.append(f"host tier {_bar(values['host_blocks_used'], values['host_blocks_total'])}")
    lines.append(f"cache     {f'{100 * hits / queries:.0f}% of prompt tokens' if queries else '-'}")
    lines += ["", f"{'latency':<15}{'p50':>10}{'p90':>10}{'p99':>10}"]
    for title, name in _LATENCIES:
        recent = since(before.buckets.get(name, {}), now.buckets.get(name, {}))
        cells = "".join(f"{_time(quantile(share, recent)):>10}" for share in (0.5, 0.9, 0.99))
        lines.append(f"{title:<15}{cells}")
    return "\n".join(lines + _adapter_lines(before, now, adapters))


def _step_tokens(before: Scrape, now: Scrape) -> str:
    """How many a step computes, on average."""
    total, steps = (now.values[name] - before.values[name] for name in _STEP_TOKENS)
    return f" of {total / steps:,.0f} tokens" if steps > 0 else ""


def _adapter_lines(before: Scrape, now: Scrape, adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of adapters and mixes, those with most tokens first. Metrics know mixes, and all names but those beyond
    their limit; the admin door knows users and slots of adapters."""
    seconds = max(now.time - before.time, 1e-9)
    known = {adapter["name"]: adapter for adapter in adapters}

    def rate(adapter: str, name: str) -> float:
        return max(now.adapters[adapter][name] - before.adapters[adapter][name], 0.0) / seconds

    rows = []
    for name in {*known, *now.adapters}:
        requests, tokens = (rate(name, counter) for counter in _ADAPTER_COUNTERS)
        if name == _OTHERS and not tokens:
            continue
        users, slot = (known.get(name, {}).get(key) for key in ("users", "slot"))
        cells = ("-" if users is None else users, "-" if slot is None else slot)
        line = f"{name:<24}{requests:>12.1f}{tokens:>12,.1f}{cells[0]:>8}{cells[1]:>8}"
        rows.append((-tokens, -(users or 0), name, line))
    if not rows:
        return []
    head = f"{'adapter':<24}{'requests/s':>12}{'tokens/s':>12}{'users':>8}{'slot':>8}"
    lines = ["", head, *(line for *_, line in sorted(rows)[:_MAX_ADAPTERS])]
    return lines + ([f"and {len(rows) - _MAX_ADAPTERS} more"] if len(rows) > _MAX_ADAPTERS else [])


def _weights(values: Mapping[str, float]) -> str:
    bits = f" ({values['quantized_bits']:.2f} bits)" if values["quantized_bits"] else ""
    return f"weights {values['weights_bytes'] / 2**30:.2f} GiB{bits}"


def _bar(used: float, total: float, width: int = 20) -> str:
    share = used / total if total else 0.0
    full = round(width * share)
    return f"[{'#' * full}{'.' * (width - full)}] {100 * share:.0f}% of {total:,.0f} blocks"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
