"""The Helm chart: Helm lints and renders it, and its objects fit Kubernetes' own schemas. No cluster is asked."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from tests.deploy.gateway_arguments import gateway_arguments
from tests.launch.helpers import ROOT
from trident_gateway.affinity import LOAD_FACTOR
from trident_gateway.places import read_places
from trident_llm.launch.options import parse_options

CHART = ROOT / "deploy/helm/trident"
EVERYTHING = {
    "image": {"repository": "registry.example/trident", "tag": "1", "pullSecrets": ["registry"]},
    "settings": {"max_model_len": "4096", "kv_cache_dtype": "int8"},
    "huggingFaceToken": {"secretName": "hub"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "modelCache": {"storageClassName": "fast"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "gateway": {
        "image": {"repository": "registry.example/gateway", "tag": "1"},
        "nodeSelector": {"gpu": "none"},
        "tolerations": [{"key": "cpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "loadFactor": 2,
        "service": {"type": "LoadBalancer"},
    },
}
BARE = {
    "modelCache": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "gateway": {"enabled": False},
}
VARIANTS = {"as shipped": {}, "everything": EVERYTHING, "bare": BARE}
KUBERNETES = ("1.28", "1.37")
OPERATOR_KINDS = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, of which no schema is at hand."""


def objects(values: dict[str, Any], name: str = "llm") -> dict[tuple[str, str], dict[str, Any]]:
    """What the chart makes, by kind and name."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name=name, namespace="models")
    manifests = [text for path, text in files.items() if path.endswith(".yaml")]
    found = [item for text in manifests for item in yaml.safe_load_all(text) if item]
    made = {(item["kind"], item["metadata"]["name"]): item for item in found}
    assert len(made) == len(found)
    return made


Made = dict[tuple[str, str], dict[str, Any]]


def pod(made: Made, kind: str = "StatefulSet", name: str = "llm-trident") -> dict[str, Any]:
    return made[kind, name]["spec"]["template"]["spec"]


def container(made: Made, kind: str = "StatefulSet", name: str = "llm-trident") -> dict[str, Any]:
    (only,) = pod(made, kind, name)["containers"]
    return only


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_lint_finds_nothing(variant: str) -> None:
    report = helm.lint(CHART, VARIANTS[variant], strict=True)
    assert report["total_charts_linted"] == 1 and report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_objects_fit_the_schemas_of_kubernetes(variant: str, version: str) -> None:
    for (kind, _), item in objects(VARIANTS[variant]).items():
        if kind not in OPERATOR_KINDS:
            kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_find_a_wrong_key() -> None:
    made = objects({})
    container(made)["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(made["StatefulSet", "llm-trident"], KUBERNETES[-1], strict=True)


def test_each_variant_makes_its_objects() -> None:
    always = {("StatefulSet", "llm-trident"), ("Service", "llm-trident"), ("Service", "llm-trident-pods")}
    gateway = {(kind, "llm-trident-gateway") for kind in ("Deployment", "Service")}
    budgets = {("PodDisruptionBudget", name) for name in ("llm-trident", "llm-trident-gateway")}
    others = {(kind, "llm-trident") for kind in ("HorizontalPodAutoscaler", *OPERATOR_KINDS)}
    assert objects(BARE).keys() == always
    assert objects({}).keys() == always | gateway | budgets
    assert objects(EVERYTHING).keys() == always | gateway | budgets | others
    assert ("PodDisruptionBudget", "llm-trident-gateway") not in objects({"gateway": {"replicas": 1}})
    assert ("StatefulSet", "my-trident") in objects({}, "my-trident")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replicas": 0}, "replicas"),
        ({"adminToken": {"secretName": ""}}, "adminToken"),
        ({"settings": {"admin_token": "in the open"}}, "admin_token"),
        ({"settings": {"max_num_seqs": 64}}, "max_num_seqs"),
        ({"modelCach": {}}, "modelCach"),
        ({"autoscaling": {"enabled": True, "minReplicas": 5}}, "minReplicas: 5 is more"),
        ({"gateway": {"loadFactor": 0.5}}, "loadFactor"),
        ({"gateway": {"workers": 0}}, "workers"),
        ({"gateway": {"apiKey": {"secretName": ""}}}, "apiKey"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmError, match=named), helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        chart.render(values, name="llm")


def test_every_value_has_a_rule() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(values: dict[str, Any], rules: dict[str, Any]) -> None:
        assert values.keys() == rules["properties"].keys() - {"global"}
        for name, value in values.items():
            rule = rules["properties"][name]
            if "$ref" in rule:
                rule = schema["definitions"][rule["$ref"].rpartition("/")[2]]
            if "properties" in rule and value:
                check(value, rule)

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["resources"].keys() == schema["definitions"]["resources"]["properties"].keys()
    check(values, schema)


def test_the_launcher_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIDENT_ADMIN_TOKEN", "a-token-of-the-secret")
    options = parse_options(["--host", "0.0.0.0", *container(objects(EVERYTHING))["args"]])
    assert options.is_public


def test_the_pod_fits_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    made = objects({})
    security = pod(made)["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in dockerfile
    ports = " ".join(str(port["containerPort"]) for port in container(made)["ports"])
    assert f"EXPOSE {ports}" in dockerfile
    mounts = {mount["name"]: mount["mountPath"] for mount in container(made)["volumeMounts"]}
    assert f"VOLUME {mounts['models']}" in dockerfile
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(made)[probe]["exec"]["command"][-1] in dockerfile
    assert container(made)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_services_find_the_pods_and_ports() -> None:
    made = objects(EVERYTHING)
    stateful = made["StatefulSet", "llm-trident"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    names = {port["name"] for port in container(made)["ports"]}
    for service in (made["Service", "llm-trident"], made["Service", stateful["serviceName"]]):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    monitor = made["ServiceMonitor", "llm-trident"]["spec"]
    selected = [
        name
        for (kind, name), item in made.items()
        if kind == "Service" and monitor["selector"]["matchLabels"].items() <= item["metadata"]["labels"].items()
    ]
    assert selected == ["llm-trident-pods"] and monitor["endpoints"][0]["port"] == "metrics"
    assert made["PodDisruptionBudget", "llm-trident"]["spec"]["selector"] == stateful["selector"]


def test_the_gateway_asks_all_servers_that_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objects(EVERYTHING)
    name = "llm-trident-gateway"
    gateway, spec = container(made, "Deployment", name), pod(made, "Deployment", name)
    for variable in gateway["env"]:
        monkeypatch.setenv(variable["name"], "a-secret")
    arguments = gateway_arguments(gateway["args"])
    assert arguments.api_key == arguments.admin_token == "a-secret" and arguments.load_factor == 2
    (place,) = read_places(arguments.url)
    host, _, port = place.url.partition(":")
    servers = made["Service", host]["spec"]
    assert place.is_name and servers["clusterIP"] == "None" and not servers.get("publishNotReadyAddresses")
    assert int(port) in {item["port"] for item in servers["ports"] if item["name"] == "grpc"}
    assert spec["terminationGracePeriodSeconds"] >= arguments.drain_timeout + int(
        gateway["lifecycle"]["preStop"]["exec"]["command"][1]
    )
    assert [port["containerPort"] for port in gateway["ports"]] == [arguments.port]
    shipped = gateway_arguments(container(objects({}), "Deployment", name)["args"])
    assert shipped.load_factor == gateway_arguments([]).load_factor == LOAD_FACTOR
    assert str(shipped.workers) == container(objects({}), "Deployment", name)["resources"]["requests"]["cpu"]
    four = container(objects({"gateway": {"workers": 4}}), "Deployment", name)
    assert gateway_arguments(four["args"]).workers == 4


def test_the_gateways_pods_are_its_own_and_not_privileged() -> None:
    made = objects(EVERYTHING)
    name = "llm-trident-gateway"
    labels = made["Deployment", name]["spec"]["template"]["metadata"]["labels"]
    for (kind, found), item in made.items():
        if kind in ("Service", "PodDisruptionBudget"):
            selector = item["spec"]["selector"]
            selects = selector.get("matchLabels", selector).items() <= labels.items()
            assert selects == (found == name), (kind, found)
    assert made["Deployment", name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    gateway = container(made, "Deployment", name)
    assert gateway["image"] == "registry.example/gateway:1"
    assert gateway["securityContext"]["readOnlyRootFilesystem"] and pod(made, "Deployment", name)["nodeSelector"]
    assert pod(made, "Deployment", name)["securityContext"]["runAsNonRoot"]
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/health"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert "nvidia.com/gpu" not in gateway["resources"]["limits"]


def test_scaling_and_alerts_are_those_of_the_metrics() -> None:
    made = objects(EVERYTHING)
    (metric,) = made["HorizontalPodAutoscaler", "llm-trident"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "trident_waiting_requests"
    assert "replicas" not in made["StatefulSet", "llm-trident"]["spec"]
    rules = yaml.safe_load((ROOT / "docs/prometheus-alerts.yml").read_text())
    assert made["PrometheusRule", "llm-trident"]["spec"] == rules


def test_the_chart_has_the_projects_version() -> None:
    version = re.search(r'(?m)^version = "(.*)"$', (ROOT / "pyproject.toml").read_text())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version and chart["appVersion"] == version[1]
