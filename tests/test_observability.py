"""The dashboard and the alert rules: well-formed, and made of metrics that are published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.launch.helpers import ROOT
from trident_llm.metrics_catalog import METRICS, published_names

DASHBOARD, ALERTS = ROOT / "docs/grafana-dashboard.json", ROOT / "docs/prometheus-alerts.yml"
PUBLISHED = {name: spec for spec in METRICS for name in published_names(spec)}
_DURATION = re.compile(r"\d+[smhd]")


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    yield from (rule["expr"] for rule in alerts())


def check_expression(expression: str) -> None:
    """Brackets match, every metric exists, counters are under a rate, buckets under a quantile, labels are theirs."""
    pairs, open_ones = {")": "(", "]": "[", "}": "{"}, []
    for character in re.sub(r'"[^"]*"', '""', expression):
        if character in pairs.values():
            open_ones.append(character)
        elif character in pairs:
            assert open_ones and open_ones.pop() == pairs[character], expression
    assert not open_ones, expression
    for match in re.finditer(r"(\w+\()?\b(trident_\w+)(\{[^}]*\})?", expression):
        function, name, selector = match.groups()
        assert name in PUBLISHED, f"{name} in {expression}"
        spec = PUBLISHED[name]
        if spec.kind != "gauge":
            assert function in ("rate(", "increase("), expression
        assert not name.endswith("_bucket") or ("histogram_quantile(" in expression and "le" in expression), expression
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector or ""):
            assert label == "engine" or (label == spec.label and value in spec.label_values), expression


def test_expressions_use_what_is_published():
    found = list(expressions())
    assert len(found) > 40
    for expression in found:
        check_expression(expression)


def test_the_dashboard_shows_every_metric():
    text = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel["targets"])
    assert [spec.name for spec in METRICS if spec.full_name not in text] == []


def test_the_dashboard_is_one_that_grafana_takes():
    loaded = dashboard()
    assert {"uid", "title", "schemaVersion", "templating", "time", "panels"} <= loaded.keys()
    panels = loaded["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels)
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat") and panel["datasource"]["uid"] == "${datasource}"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    assert {variable["name"] for variable in loaded["templating"]["list"]} == {"datasource", "engine"}


def test_alerts_are_complete():
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
        assert "for" not in rule or _DURATION.fullmatch(rule["for"])
