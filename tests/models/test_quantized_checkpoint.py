"""AWQ, GPTQ and compressed-tensors checkpoints, against transformers on the weights that they stand for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.quantized_folders import (
    Folders,
    awq_tensors,
    gptq_tensors,
    int_tensors,
    pack_rows,
    packed_tensors,
    round_layer,
    write_quantized,
)
from tests.fakes.tiny_decoders import CPU, TinyDecoder
from trident_llm.errors import LoadFailed
from trident_llm.kernels.quantized_weight import QuantizedWeight
from trident_llm.kernels.reference_quantized import PackedWeight, quantize_tokens
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.llama import LlamaDecoder
from trident_llm.models.source import resolve_model
from trident_llm.models.weights import WeightReader, iter_weights, open_weights

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
TOKENS = random.Random(0).choices(range(320), k=40)
NAME = "model.layers.1.mlp.up_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def compressed(
    weights: dict[str, Any], activations: dict[str, Any] | None = None, targets: tuple[str, ...] = ("Linear",)
) -> dict[str, Any]:
    form = "float" if weights.get("type") == "float" else ("int" if activations else "pack")
    group = {"targets": list(targets), "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{form}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed_config(bits: int, symmetric: bool, group_size: int | None = 32) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    return compressed({"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy})


def integers(tensors: Callable[..., dict[str, torch.Tensor]], bits: int, size: int | None = 32, **how: Any) -> Any:
    """A ``store``: round to integers, then ``tensors``. how: options of round_layer or, with an _, of ``tensors``."""
    options = {key.removeprefix("_"): value for key, value in how.items() if key.startswith("_")}
    rounding = {key: value for key, value in how.items() if not key.startswith("_")}

    def store(module: str, weight: torch.Tensor) -> Stored:
        layer = round_layer(weight, bits, size or weight.shape[1], **rounding)
        return tensors(layer, **options), layer.weight()

    return store


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "awq": (AWQ, integers(awq_tensors, 4)),
    "gptq": (GPTQ, integers(gptq_tensors, 4, _less=1)),
    "gptq-symmetric-8": ({**GPTQ, "bits": 8, "sym": True}, integers(gptq_tensors, 8, symmetric=True, _less=1)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, integers(gptq_tensors, 4, _less=0)),
    "gptq-ordered": ({**GPTQ, "desc_act": True}, integers(gptq_tensors, 4, shuffle=3, _less=1)),
    "gptq-channel": ({**GPTQ, "group_size": -1}, integers(gptq_tensors, 4, None, _less=1)),
    "packed-4": (packed_config(4, False), integers(packed_tensors, 4, _symmetric=False)),
    "packed-4-symmetric": (packed_config(4, True), integers(packed_tensors, 4, symmetric=True, _symmetric=True)),
    "packed-5": (packed_config(5, False), integers(packed_tensors, 5, _symmetric=False)),
    "packed-6": (packed_config(6, True), integers(packed_tensors, 6, symmetric=True, _symmetric=True)),
    "packed-8-channel": (
        packed_config(8, True, None),
        integers(packed_tensors, 8, None, symmetric=True, _symmetric=True),
    ),
}


def reader_of(folder: Path, dtype: torch.dtype = torch.float32) -> WeightReader:
    source = resolve_model(str(folder))
    return open_weights(source, read_model_config(source), dtype=dtype, device="cpu")


def decoder_of(folder: Path) -> LlamaDecoder:
    config = read_model_config(resolve_model(str(folder)))
    decoder = LlamaDecoder(config, dtype=torch.float32, device=CPU, max_model_len=64)
    decoder.load_weights(iter_weights(reader_of(folder)))
    return decoder


def logits_of(decoder: LlamaDecoder) -> torch.Tensor:
    steps = PagedSteps(1, max_len=64, block_size=8)
    schedule = [[Chunk(0, 0, 30)], *([Chunk(0, position, 1)] for position in range(30, len(TOKENS)))]
    return TinyDecoder(None, decoder, decoder.config).run(steps, [TOKENS], schedule)[0]


def expected_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float()


@pytest.fixture(params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> Folders:
    return write_quantized(tmp_path, *CASES[request.param])


def test_logits_are_those_of_the_dequantized_weights(folders: Folders) -> None:
    decoder = decoder_of(folders.quantized)
    for layer in decoder.layers:
        assert all(isinstance(getattr(layer, name).weight, PackedWeight) for name in ("qkv", "o", "gate_up", "down"))
    torch.testing.assert_close(logits_of(decoder), expected_logits(folders.dense), rtol=0, atol=2e-4)


def test_every_weight_is_read_exactly(folders: Folders) -> None:
    reader, dense = reader_of(folders.quantized), load_file(folders.dense / "model.safetensors")
    assert set(reader.shapes) == set(dense)
    for name, expected in dense.items():
        assert torch.allclose(reader.read(name), expected, rtol=1e-6, atol=1e-7), name
        if name.endswith("_proj.weight"):
            stored = reader.read_stored(name)
            assert isinstance(stored, QuantizedWeight) and torch.equal(stored.dequantize(), reader.read(name))


@pytest.mark.parametrize("symmetric", [True, False])
def test_w8a8(tmp_path: Path, symmetric: bool) -> None:
    config = compressed(
        {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"},
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    )
    folders = write_quantized(tmp_path, config, integers(int_tensors, 8, None, symmetric=symmetric))
    weight = reader_of(folders.quantized).read_stored(f"{NAME}.weight")
    assert isinstance(weight, QuantizedWeight) and weight.activations == "int8" and weight.group_size == 64
    check_rounded_inputs(folders, "int8")


@pytest.mark.parametrize("per_tensor", [True, False])
def test_fp8(tmp_path: Path, per_tensor: bool) -> None:
    def store(module: str, weight: torch.Tensor) -> Stored:
        largest = weight.abs().amax() if per_tensor else weight.abs().amax(1, keepdim=True)
        codes = (weight / (largest / 448)).to(torch.float8_e4m3fn)
        scale = (largest / 448).reshape(1) if per_tensor else largest / 448
        parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
        return parts, codes.float() * (largest / 448)

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor" if per_tensor else "channel"}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    folders = write_quantized(tmp_path, compressed(weights, activations), store)
    check_rounded_inputs(folders, "fp8")
    weight_only = write_quantized(tmp_path / "b", compressed(weights), store)
    torch.testing.assert_close(
        logits_of(decoder_of(weight_only.quantized)), expected_logits(weight_only.dense), rtol=0, atol=2e-4
    )


def check_rounded_inputs(folders: Folders, kind: Any) -> None:
    """transformers with every projection's input rounded to 8 bits per token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders.dense, dtype=torch.float32).eval()

    def rounded(_: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = quantize_tokens(inputs[0][0], kind)
        return (codes * scales)[None]

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    actual = logits_of(decoder_of(folders.quantized))
    # A value in the middle of two steps may go either way: a step of one input, not the whole logits.
    assert (actual - expected).norm() < 0.01 * expected.norm()


def test_parts_of_different_formats_become_full_precision(tmp_path: Path) -> None:
    narrow, wide = integers(packed_tensors, 4, _symmetric=False), integers(packed_tensors, 8, _symmetric=False)
    config = packed_config(8, False)
    group = json.loads(json.dumps(packed_config(4, False)["config_groups"]["group_0"]))
    config["config_groups"]["group_1"] = {**group, "targets": ["re:.*k_proj$", "model.layers.0.mlp.up_proj"]}
    quarter = ("k_proj", "layers.0.mlp.up_proj")
    folders = write_quantized(
        tmp_path, config, lambda module, weight: (narrow if module.endswith(quarter) else wide)(module, weight)
    )
    decoder = decoder_of(folders.quantized)
    names = ("qkv", "o", "gate_up", "down")
    packed = [[isinstance(getattr(layer, name).weight, PackedWeight) for name in names] for layer in decoder.layers]
    assert packed == [[False, True, False, True], [False, True, True, True]]
    torch.testing.assert_close(logits_of(decoder), expected_logits(folders.dense), rtol=0, atol=2e-4)


def test_different_input_orders_become_full_precision(tmp_path: Path) -> None:
    orders = {"k_proj": 4, "q_proj": 5}
    folders = write_quantized(
        tmp_path,
        CASES["gptq-ordered"][0],
        lambda module, weight: integers(gptq_tensors, 4, shuffle=orders.get(module.split(".")[-1], 3), _less=1)(
            module, weight
        ),
    )
    decoder = decoder_of(folders.quantized)
    assert isinstance(decoder.layers[0].qkv.weight, torch.Tensor)
    torch.testing.assert_close(logits_of(decoder), expected_logits(folders.dense), rtol=0, atol=2e-4)


def test_older_packing_of_six_bits(tmp_path: Path) -> None:
    def tensors(layer: Any) -> dict[str, torch.Tensor]:
        packed = packed_tensors(layer, symmetric=True)
        padded = torch.nn.functional.pad(torch.from_numpy(layer.codes), (0, -layer.codes.shape[1] % 5))
        return packed | {"weight_packed": pack_rows(padded.numpy(), 6)}

    folders = write_quantized(tmp_path, packed_config(6, True), integers(tensors, 6, symmetric=True))
    expected = load_file(folders.dense / "model.safetensors")[f"{NAME}.weight"]
    assert torch.allclose(reader_of(folders.quantized).read(f"{NAME}.weight"), expected, rtol=1e-6)


def test_biases_of_zeros_that_gptq_adds(tmp_path: Path) -> None:
    folders = write_quantized(tmp_path, *CASES["gptq"])
    rewrite(folders.quantized, **{f"{NAME}.bias": torch.zeros(128)})
    reader_of(folders.quantized)
    rewrite(folders.quantized, **{f"{NAME}.bias": torch.ones(128)})
    with pytest.raises(LoadFailed, match=rf"{NAME}\.bias: unexpected"):
        reader_of(folders.quantized)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("packed")])
def test_compressed_tensors_reads_the_same(tmp_path: Path, case: str) -> None:
    """The package that the format comes from."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folders = write_quantized(tmp_path, *CASES[case])
    group = CASES[case][0]["config_groups"]["group_0"]
    stored = load_file(folders.quantized / "model.safetensors")
    parts = {name.removeprefix(f"{NAME}."): part for name, part in stored.items() if name.startswith(f"{NAME}.")}
    theirs = PackedQuantizationCompressor.decompress(parts, QuantizationScheme(**group))["weight"].float()
    assert torch.allclose(reader_of(folders.quantized).read(f"{NAME}.weight"), theirs, rtol=1e-3, atol=1e-4)


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    folders = write_quantized(tmp_path, *CASES["packed-4-symmetric"])
    torch.testing.assert_close(
        logits_of(decoder_of(folders.quantized)), expected_logits(folders.quantized), rtol=0, atol=5e-3
    )


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: values.clone() for name, values in load_file(path).items()} | changes
    save_file({name: values for name, values in tensors.items() if values is not None}, path)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("awq", {f"{NAME}.scales": None}, [f"{NAME}.qweight", "has no scales beside it"]),
        ("awq", {f"{NAME}.scales": torch.ones(3, 128)}, [f"{NAME}.qweight", "do not fit"]),
        ("awq", {f"{NAME}.qweight": None, f"{NAME}.qzeros": None, f"{NAME}.scales": None}, ["missing", NAME]),
        ("awq", {f"{NAME}.qweight": torch.ones(64, 15, dtype=torch.int32)}, ["has shape [120, 64]", "[128, 64]"]),
        ("awq", {f"{NAME}.extra": torch.ones(3)}, [f"{NAME}.extra: unexpected"]),
        ("gptq", {f"{NAME}.g_idx": torch.zeros(64, dtype=torch.int32)}, ["groups of unequal size"]),
        ("gptq", {f"{NAME}.g_idx": torch.zeros(8, dtype=torch.int32)}, ["the groups of 8 inputs"]),
        ("packed-4", {f"{NAME}.weight_shape": torch.tensor([128, 63])}, ["weight_shape is [128, 63]"]),
        ("packed-4", {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, ["model.norm.weight", "no group for it"]),
        ("awq", {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, ["model.norm.weight: dtype I8"]),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, case: str, changes: dict[str, Any], words: list[str]) -> None:
    config, store = CASES[case]
    if case == "packed-4":
        config = json.loads(json.dumps(config))
        config["config_groups"]["group_0"]["targets"] = ["re:.*_proj$"]
    folder = write_quantized(tmp_path, config, store).quantized
    rewrite(folder, **changes)
    with pytest.raises(LoadFailed) as caught:
        reader = reader_of(folder)
        reader.read(f"{NAME}.weight")
    assert str(folder / "model.safetensors") in caught.value.message
    assert all(word in caught.value.message for word in words), caught.value.message
