"""What an adapter's folder may hold: everything else is refused by name, and changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.conftest import AdaptedModel
from trident_llm import Engine, EngineConfig
from trident_llm.errors import BadRequest, NotFound, TridentError

A_TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


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


def config_with(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors[B_TENSOR][3, 1] = float("nan")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED: dict[str, tuple[Callable[[Path], Any], type[TridentError], str]] = {
    "nan": (tensors_with(poisoned), BadRequest, rf"tensor '{B_TENSOR}' holds values that are not finite"),
    "overflow": (config_with(lora_alpha=1e42), BadRequest, "beyond the range"),
    "integers": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR: tensors[A_TENSOR].to(torch.int32)})), BadRequest,
        "not finite numbers",
    ),
    "wrong-base": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR: torch.zeros(4, 100)})), BadRequest,
        r"lora_A of model.layers.0.self_attn.q_proj has shape \[4, 100\]; .* say \[4, 64\]",
    ),
    "wrong-rank": (config_with(r=5), BadRequest, r"has shape \[4, \d+\]; .*rank 5"),
    "rank-above": (config_with(r=9), BadRequest, r"rank 9 of .* is above max_lora_rank \(8\)"),
    "half-missing": (tensors_with(lambda tensors: tensors.pop(B_TENSOR)), BadRequest, "lora_B of .* is missing"),
    "too-deep": (
        tensors_with(lambda tensors: tensors.update({A_TENSOR.replace("layers.0", "layers.7"): torch.zeros(4, 64)})),
        BadRequest, "model.layers.7.self_attn.q_proj is no module of the base model",
    ),
    "embedding": (
        tensors_with(lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": torch.zeros(4)})),
        BadRequest, "tensor 'base_model.model.model.embed_tokens.weight' is not supported",
    ),
    "no-magnitudes": (config_with(use_dora=True), BadRequest, "lora_magnitude_vector of .* is missing"),
    "modules-to-save": (config_with(modules_to_save=["lm_head"]), BadRequest, "modules_to_save is set"),
    "bias": (config_with(bias="all"), BadRequest, "bias 'all' is not supported"),
    "lora-bias": (config_with(lora_bias=True), BadRequest, "lora_bias is set"),
    "other-method": (config_with(peft_type="LOHA"), BadRequest, "peft_type 'LOHA' is not supported"),
    "rank-zero": (config_with(r=0), BadRequest, "a rank of 0 is not an integer of at least 1"),
    "no-json": (lambda folder: (folder / "adapter_config.json").write_text("{"), BadRequest, "cannot be read"),
    "a-list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), BadRequest, "no JSON object"),
    "no-config": (lambda folder: (folder / "adapter_config.json").unlink(), NotFound, "no adapter_config.json"),
    "no-weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), NotFound, "no adapter_model"),
    "pickle": (pickled, BadRequest, r"weights are pickled \(adapter_model.bin\); loading such a file can run any code"),
    "cut-short": (cut_short, BadRequest, "adapter_model.safetensors cannot be read"),
}  # fmt: skip


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
        with pytest.raises(BadRequest, match="lies outside adapter_root"):
            engine.load_adapter("x", path)
    with pytest.raises(BadRequest, match="safetensors is a link to outside adapter_root"):
        engine.load_adapter("x", "half")
    for path in ("", "a\0b"):
        with pytest.raises(BadRequest, match="is not allowed; give a folder"):
            engine.load_adapter("x", path)
    with pytest.raises(NotFound, match="'nothing' is no folder below adapter_root"):
        engine.load_adapter("x", "nothing")
    assert [adapter["name"] for adapter in engine.list_adapters()["adapters"]] == ["a"]


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
