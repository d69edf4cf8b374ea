"""What an adapter's folder may hold: everything else is refused by name, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.helpers import AdaptedModel
from tests.fakes.broken_adapters import REFUSED
from trident_llm import Engine, EngineConfig
from trident_llm.adapters.sources import copy_files
from trident_llm.errors import BadRequest, LoadFailed, NotFound


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def engine(adapted: AdaptedModel, root: Path) -> Any:
    config = EngineConfig(
        model=str(adapted.folder), dtype="fp32", device="cpu", max_num_blocks=64, adapter_root=str(root),
        adapters=f"a={adapted.path('a')}", max_lora_rank=8, max_loras=2,
    )  # fmt: skip
    with Engine(config) as engine:
        yield engine


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_changed(case: str, engine: Engine, adapted: AdaptedModel, root: Path) -> None:
    spoil, error, reason = REFUSED[case]
    folder = root / case
    shutil.copytree(adapted.path("a"), folder)
    spoil(folder)
    before = engine.list_adapters()
    for name in ("new", "a"):
        with pytest.raises(error, match=f"adapter '{name}': .*{reason}"):
            engine.load_adapter(name, case)
    assert engine.list_adapters() == before
    engine.check_integrity()


def test_folders_outside_the_root_are_refused(engine: Engine, adapted: AdaptedModel, root: Path) -> None:
    (root / "link").symlink_to(adapted.path("a"))
    shutil.copytree(adapted.path("a"), root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    (root / "half" / "adapter_model.safetensors").symlink_to(adapted.path("a") / "adapter_model.safetensors")
    for path in (str(adapted.path("a")), f"../{adapted.root.name}/a", "link", "/etc"):
        with pytest.raises(BadRequest, match=r"lies outside adapter_root$"):
            engine.load_adapter("x", path)
    with pytest.raises(BadRequest, match="safetensors is a link to outside adapter_root"):
        engine.load_adapter("x", "half")
    for path in ("", "a\0b"):
        with pytest.raises(BadRequest, match="is not allowed; give a folder"):
            engine.load_adapter("x", path)
    with pytest.raises(NotFound, match=r"'nothing' is no folder below adapter_root$"):
        engine.load_adapter("x", "nothing")
    assert [adapter["name"] for adapter in engine.list_adapters()["adapters"]] == ["a"]


def test_errors_of_copying_name_no_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadFailed, match=r"^.*adapter 'x': its files cannot be copied: Not a directory$"):
        copy_files(tmp_path, tmp_path / "adapter_config.json" / "copies", ("adapter_config.json",), "adapter 'x'")


def test_a_link_within_the_root_is_followed(engine: Engine, adapted: AdaptedModel, root: Path) -> None:
    shutil.copytree(adapted.path("b"), root / "inside")
    (root / "alias").symlink_to(root / "inside")
    loaded = engine.load_adapter("alias", "alias")
    assert (loaded["rank"], loaded["modules"], loaded["dora"]) == (8, 4, False)
    engine.unload_adapter("alias")


def test_without_a_root_nothing_is_loaded_while_serving(adapted: AdaptedModel) -> None:
    settings = {"model": str(adapted.folder), "dtype": "fp32", "device": "cpu", "max_num_blocks": 64}
    loaded = {"adapters": f"a={adapted.path('a')}"}
    for adapters, reason in ((loaded, "set adapter_root"), ({}, "has no room for adapters")):
        config = EngineConfig(**settings, **adapters)
        with Engine(config) as engine, pytest.raises(BadRequest, match=reason):
            engine.load_adapter("b", str(adapted.path("b")))


def test_a_setting_that_cannot_be_loaded_ends_the_start(adapted: AdaptedModel, tmp_path: Path) -> None:
    settings = {"model": str(adapted.folder), "dtype": "fp32", "device": "cpu", "max_num_blocks": 64}
    with pytest.raises(NotFound, match=f"adapter 'a': no folder '{tmp_path}/nothing'"):
        Engine(EngineConfig(**settings, adapters=f"a={tmp_path}/nothing"))
