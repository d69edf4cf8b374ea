"""resolve_model on local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trident_llm.errors import BadRequest, LoadFailed, NotFound
from trident_llm.models.source import resolve_model


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def write_index(folder: Path, **weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_come_in_order_of_name(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "m-2.safetensors", "m-1.safetensors", "consolidated.safetensors")
    write_index(tmp_path, a="m-2.safetensors", b="m-1.safetensors", c="m-2.safetensors")
    source = resolve_model(str(tmp_path))
    assert [path.name for path in source.weight_files] == ["m-1.safetensors", "m-2.safetensors"]
    assert (source.format, source.folder, source.revision) == ("safetensors", tmp_path, "")


def test_single_safetensors_wins_over_gguf(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "any.safetensors", "model.gguf")
    assert [path.name for path in resolve_model(str(tmp_path)).weight_files] == ["any.safetensors"]


def test_gguf_by_folder_and_by_file(tmp_path: Path) -> None:
    make(tmp_path, "model.gguf")
    by_folder, by_file = resolve_model(str(tmp_path)), resolve_model(str(tmp_path / "model.gguf"))
    assert by_folder.weight_files == by_file.weight_files == (tmp_path / "model.gguf",)
    assert by_folder.format == by_file.format == "gguf" and by_file.folder == tmp_path


def test_without_weights_config_json_is_enough(tmp_path: Path) -> None:
    make(tmp_path, "config.json")
    assert resolve_model(str(tmp_path), weights=False).weight_files == ()
    with pytest.raises(NotFound, match=r"no \*\.safetensors or \*\.gguf weights in"):
        resolve_model(str(tmp_path))


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, "model.gguf")
    assert resolve_model("~").folder == tmp_path


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", "nowhere.gguf"])
def test_missing_path_is_named(model: str) -> None:
    with pytest.raises(NotFound, match="no such file or folder") as caught:
        resolve_model(model)
    assert model in caught.value.message


@pytest.mark.parametrize("model", ["x" * 5000, "~nobody-of-that-name/x"])
def test_impossible_path(model: str) -> None:
    with pytest.raises(BadRequest, match="neither a Hugging Face id nor a path"):
        resolve_model(model)


def test_several_gguf_files_are_listed(tmp_path: Path) -> None:
    make(tmp_path, "a.gguf", "b.gguf")
    with pytest.raises(BadRequest, match=r"several GGUF files; give the path of one of them: a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))


def test_several_safetensors_need_an_index(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "a.safetensors", "b.safetensors")
    with pytest.raises(LoadFailed, match=r"no model\.safetensors\.index\.json"):
        resolve_model(str(tmp_path))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make(tmp_path, "config.json")
    write_index(tmp_path, a="m-1.safetensors")
    with pytest.raises(NotFound, match=r"names m-1\.safetensors, which is missing"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["../secret.safetensors", "weights.bin", 3])
def test_index_may_only_name_files_beside_it(tmp_path: Path, name: object) -> None:
    make(tmp_path, "config.json")
    write_index(tmp_path, a=name)
    with pytest.raises(LoadFailed, match="not the name of a safetensors file in the same folder"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(tmp_path: Path, text: str) -> None:
    make(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadFailed, match="not an index of safetensors files"):
        resolve_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "pytorch_model.bin")
    for model in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(BadRequest, match=r"pytorch_model\.bin.*can run any code"):
            resolve_model(str(model))


def test_config_json_is_needed_beside_safetensors(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors")
    with pytest.raises(NotFound, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(BadRequest, match="give the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_empty_name_and_revision_of_a_local_path(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="model: empty"):
        resolve_model(" ")
    with pytest.raises(BadRequest, match="revision: 'v1'"):
        resolve_model(str(make(tmp_path, "model.gguf")), "v1")
