"""The disk cache: what is written comes back, and nothing else ever does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.quantization import cache, fp8, rtn, smoothquant
from trident_llm.quantization.cache import CachedParameters, CacheWriter, DamagedCache

CPU = torch.device("cpu")


def parameters() -> dict[str, torch.Tensor | QuantizedWeight]:
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    methods = {
        f"rtn{bits}.weight": rtn.quantize(weight, bits=bits, group_size=32, symmetric=bits == 8)
        for bits in (4, 5, 6, 8)
    }
    return {
        **methods,
        "int8.weight": smoothquant.quantize(weight),
        "fp8.weight": fp8.quantize(weight),
        "norm.weight": weight[0].bfloat16(),
        "int8.input_scales": weight[1].abs(),
    }


def write(folder: Path) -> None:
    writer = CacheWriter(folder)
    for name, value in parameters().items():
        writer.add(name, value)
    writer.finish({"seconds": 1.5})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "cache" / "abc")
    return tmp_path / "cache" / "abc"


@pytest.mark.parametrize("file_bytes", [1, 3000, 1 << 30])
def test_everything_comes_back_in_order(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(cache, "_FILE_BYTES", file_bytes)
    write(tmp_path / "abc")
    cached = CachedParameters(tmp_path / "abc")
    actual, expected = list(cached.parameters(CPU)), list(parameters().items())
    assert [name for name, _ in actual] == [name for name, _ in expected]
    assert cached.report == {"seconds": 1.5}
    for (_, value), (name, original) in zip(actual, expected, strict=True):
        if isinstance(original, torch.Tensor):
            assert value.dtype == original.dtype and torch.equal(value, original)
            continue
        assert isinstance(value, QuantizedWeight), name
        for field in ("bits", "group_size", "activations", "input_order", "shape"):
            assert getattr(value, field) == getattr(original, field), name
        assert value.scales.dtype == original.scales.dtype and torch.equal(value.scales, original.scales)
        assert torch.equal(value.zero_points, original.zero_points)
        assert torch.equal(value.codes.float(), original.codes.float())
    assert os.listdir(tmp_path) == ["abc"]


def truncate(folder: Path) -> None:
    path = folder / "000.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def flip_a_bit(folder: Path) -> None:
    path = folder / "000.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / "000.safetensors").unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-30])


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lose_a_file, cut_the_manifest, empty_the_manifest], ids=lambda f: f.__name__
)
def test_damage_is_noticed_before_anything_is_used(folder, damage):
    damage(folder)
    with pytest.raises(DamagedCache):
        CachedParameters(folder)


def test_writing_again_replaces_what_is_damaged(folder):
    truncate(folder)
    write(folder)
    assert len(list(CachedParameters(folder).parameters(CPU))) == len(parameters())


def test_what_is_not_finished_is_never_seen(tmp_path):
    writer = CacheWriter(tmp_path / "abc")
    writer.add("norm.weight", torch.ones(4))
    assert cache.open_cache(tmp_path / "abc", print) is None
    writer.discard()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, new = CacheWriter(tmp_path / "old"), CacheWriter(tmp_path / "new")
    made = sorted(tmp_path.iterdir())
    os.utime(made[0], (0, 0))
    CacheWriter(tmp_path / "other").discard()
    assert sorted(tmp_path.iterdir()) == made[1:]
    for writer in (old, new):
        writer.discard()


def test_keys_depend_on_every_part():
    key = cache.cache_key({"weights": "a", "plan": {"x": 4}})
    assert key == cache.cache_key({"plan": {"x": 4}, "weights": "a"})
    assert key != cache.cache_key({"weights": "a", "plan": {"x": 5}})
    assert key != cache.cache_key({"weights": "b", "plan": {"x": 4}})


def test_files_are_told_apart_by_content_size_and_time(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1 << 20))
    os.utime(path, ns=(0, 10**18))
    first = cache.files_identity([path])
    assert first == cache.files_identity([path])
    with path.open("r+b") as file:
        file.seek((1 << 20) - 5)
        file.write(b"x")
    os.utime(path, ns=(0, 10**18))
    changed = cache.files_identity([path])
    os.utime(path, ns=(0, 10**18 + 1))
    touched = cache.files_identity([path])
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(0, 10**18 + 1))
    assert len({first, changed, touched, cache.files_identity([path])}) == 4
