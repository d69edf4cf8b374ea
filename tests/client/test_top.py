"""``trident top`` against a server that speaks gRPC and a page of metrics."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.fakes.fake_triton import FakeTriton
from trident_client.cli import main
from trident_client.metrics_text import parse_metrics, quantile, since

PAGE = """# HELP trident_doors Door processes
# TYPE trident_doors gauge
trident_doors{{engine="llm"}} 7
nv_inference_count{{model="llm",version="1"}} 3
trident_engine_ready{{engine="llm"}} 1
trident_running_requests{{engine="llm"}} 3
trident_kv_blocks_total{{engine="llm"}} 200
trident_kv_blocks_used{{engine="llm"}} 50
trident_output_tokens_total{{engine="llm"}} {tokens}
trident_prefix_cache_query_tokens_total{{engine="llm"}} {tokens}
trident_prefix_cache_hit_tokens_total{{engine="llm"}} {hits}
trident_adapter_generated_tokens_total{{engine="llm",adapter="_other"}} 0
trident_adapter_generated_tokens_total{{engine="llm",adapter="idle"}} 7
trident_adapter_generated_tokens_total{{engine="llm",adapter="mix"}} {tokens}
trident_adapter_requests_total{{engine="llm",adapter="mix"}} {early}
trident_iteration_tokens_total_sum{{engine="llm"}} {tokens}
trident_iteration_tokens_total_count{{engine="llm"}} {hits}
trident_requests_finished_total{{engine="llm",reason="stop"}} 4
trident_requests_finished_total{{engine="llm",reason="length"}} 5
trident_time_to_first_token_seconds_bucket{{engine="llm",le="0.1"}} {early}
trident_time_to_first_token_seconds_bucket{{engine="llm",le="0.5"}} {all}
trident_time_to_first_token_seconds_bucket{{engine="llm",le="+Inf"}} {all}
"""


@contextlib.contextmanager
def metrics_page() -> Iterator[str]:
    """A page on which every look finds more."""
    looks = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal looks
            looks += 1
            numbers = {"tokens": 1000 * looks, "hits": 250 * looks, "early": 50 * looks, "all": 100 * looks}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.format(**numbers).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_one_frame(capsys: pytest.CaptureFixture[str]):
    with FakeTriton() as server, metrics_page() as url:
        server.results["stats"] = {"device": "cuda", "dtype": "bfloat16"}
        rows = [{"name": "idle", "users": 0, "slot": None}, {"name": "busy", "users": 2, "slot": 1}]
        server.results["list_adapters"] = {"adapters": rows}
        assert main(["top", "--once", "--interval", "0.2", "--url", server.url, "--metrics-url", url]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["engine"].startswith("ready, 0 restarts   cuda, bfloat16")
    assert lines["requests"].startswith("3 running, 0 waiting")
    rate = float(lines["tokens"].partition("/s out")[0].replace(",", ""))
    assert 2500 < rate < 5100 and lines["tokens"].endswith("steps/s of 4 tokens")
    assert lines["KV"] == "pool   [#####...............] 25% of 200 blocks, 0 cached"
    assert lines["cache"] == "25% of prompt tokens"
    assert lines["first"].split() == ["token", "100.0", "ms", "420.0", "ms", "492.0", "ms"]
    assert lines["per"].split() == ["token", "-", "-", "-"]
    assert [name for name in lines if name in ("busy", "idle", "mix", "_other")] == ["mix", "busy", "idle"]
    assert lines["adapter"].split() == ["requests/s", "tokens/s", "users", "slot"]
    assert lines["idle"].split() == ["0.0", "0.0", "0", "-"] and lines["busy"].split() == ["0.0", "0.0", "2", "1"]
    requests, tokens, users, slot = lines["mix"].split()
    assert float(tokens.replace(",", "")) == rate and float(requests) == pytest.approx(rate / 20, abs=0.06)
    assert (users, slot) == ("-", "-")


def test_without_metrics_it_says_where_it_looked(capsys: pytest.CaptureFixture[str]):
    with FakeTriton() as server:
        bad = ["top", "--once", "--url", server.url, "--metrics-url", "http://127.0.0.1:1/metrics"]
        assert main(bad) == 3
        assert "no metrics at http://127.0.0.1:1/metrics" in capsys.readouterr().err
        assert main(["top", "--interval", "0", "--url", server.url]) == 2
        assert "--interval: 0 is not allowed" in capsys.readouterr().err


def test_quantiles_are_those_of_promql():
    inf = float("inf")
    buckets = {1.0: 10.0, 2.0: 30.0, 4.0: 40.0, inf: 50.0}
    assert quantile(0.5, buckets) == 1.75
    assert quantile(0.1, buckets) == 0.5
    assert quantile(0.99, buckets) == 4.0
    assert quantile(0.5, {1.0: 0.0, inf: 0.0}) is None
    assert quantile(0.5, {}) is None
    assert since({1.0: 4.0}, {1.0: 10.0, inf: 10.0}) == {1.0: 6.0, inf: 10.0}


def test_labels_are_summed():
    scrape = parse_metrics(PAGE.format(tokens=1, hits=0, early=0, all=0), 0.0)
    assert scrape.values["requests_finished_total"] == 9
    assert scrape.values["adapter_generated_tokens_total"] == 8
    assert scrape.adapters["mix"] == {"adapter_generated_tokens_total": 1, "adapter_requests_total": 0}
    assert "inference_count" not in scrape.values
