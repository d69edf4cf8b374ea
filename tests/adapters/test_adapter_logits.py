"""Logits with adapters equal PEFT's in float32, whatever the adapters and however the work is cut up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.lora_problems import lora_rows
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.fakes.peft_adapters import ALL_LINEAR, ATTENTION, logits, write_adapter
from tests.fakes.tiny_decoders import CPU, TinyDecoder, make_tiny
from trident_llm.adapters.adapter import Adapter
from trident_llm.adapters.adapter_file import AdapterTarget, read_adapter
from trident_llm.adapters.device_slots import DeviceSlots
from trident_llm.adapters.slots import SlotLoad
from trident_llm.engine.batch import StepAdapters
from trident_llm.kernels.quantized_weight import QuantizedWeight, stack

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def tiny() -> TinyDecoder:
    return make_tiny("Llama")


@pytest.fixture(scope="module")
def biased() -> TinyDecoder:
    return make_tiny("Llama", BIASES, {**BIASES, "attention_output_bias": True})


def put_into_slots(tiny: TinyDecoder, folders: list[Path], num_slots: int = 3) -> None:
    """Adapter i goes to slot i."""
    target = AdapterTarget(tuple(tiny.decoder.adaptable_linears()), torch.float32, CPU, max_rank=16)
    slots = DeviceSlots(target.linears, num_slots=num_slots, max_rank=16, dtype=torch.float32, device=CPU)
    for slot, folder in enumerate(folders):
        weights = read_adapter(folder, folder.name, target)
        adapter = Adapter(
            name=folder.name, generation=slot, source="", digest="", folder=folder, rank=weights.rank, num_modules=0,
            num_bytes=0, uses_dora=False, weights=weights,
        )  # fmt: skip
        slots.apply([SlotLoad(slot, adapter)])


def run(tiny: TinyDecoder, weights: list[list[float]], token_ids: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of sequences that take ``weights[i]`` of the slots, with prompts cut into chunks of ``chunk`` tokens."""
    steps = AdaptedSteps(len(token_ids), max_len=max(map(len, token_ids)), block_size=8)
    steps.weights = weights
    schedule, done = [], [0] * len(token_ids)
    while any(count < len(ids) for count, ids in zip(done, token_ids, strict=True)):
        chunks = [
            Chunk(i, done[i], min(chunk, len(ids) - done[i])) for i, ids in enumerate(token_ids) if done[i] < len(ids)
        ]
        chunks.sort(key=lambda item: item.num_tokens > 1)
        schedule.append(chunks)
        for item in chunks:
            done[item.seq] += item.num_tokens
    return tiny.run(steps, token_ids, schedule)


class AdaptedSteps(PagedSteps):
    weights: list[list[float]]

    def model_input(self, token_ids: list[list[int]], chunks: list[Chunk]) -> Any:
        plain = super().model_input(token_ids, chunks)
        rows = lora_rows(torch.tensor([[self.weights[c.seq] for c in chunks for _ in range(c.num_tokens)]]))
        return dataclasses.replace(plain, adapters=StepAdapters(rows, rows))


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES = {
    "attention": {"targets": ATTENTION},
    "mlp": {"targets": ("gate_proj", "down_proj")},
    "one-module": {"targets": ("v_proj",)},
    "all": {"targets": ALL_LINEAR, "r": 7, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 9},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "k_proj": 2, r".*\.0\.mlp\.up_proj": 11},
        "alpha_pattern": {"o_proj": 2, "layers.2.mlp.gate_proj": 16},
    },
    "some-layers": {"layers_to_transform": [0, 2]},
    "dora": {"use_dora": True},
    "dora-some": {"use_dora": True, "targets": ("q_proj", "v_proj", "up_proj", "down_proj"), "use_rslora": True},
}


@pytest.mark.parametrize("model", ["tiny", "biased"])
@pytest.mark.parametrize("case", CASES)
def test_one_adapter(case: str, model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    decoder: TinyDecoder = request.getfixturevalue(model)
    oracle = write_adapter(decoder.oracle, tmp_path, seed=3, **CASES[case])
    put_into_slots(decoder, [tmp_path])
    ids = tokens(40)
    (found,) = run(decoder, [[1.0, 0.0, 0.0]], [ids], chunk=13)
    expected = logits(oracle, ids)
    assert (expected - decoder.expected(ids)).abs().max() > 0.1, "the adapter changes nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sequences_with_different_adapters_and_none_share_a_step(tiny: TinyDecoder, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    oracles = [
        write_adapter(tiny.oracle, folders[0], seed=1, r=3),
        write_adapter(tiny.oracle, folders[1], seed=2, use_dora=True),
        write_adapter(tiny.oracle, folders[2], seed=3, targets=ATTENTION, r=16),
    ]
    put_into_slots(tiny, folders)
    prompts = [tokens(20 + i, seed=i) for i in range(4)]
    weights = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.0, 0, 0]]
    found = run(tiny, weights, prompts, chunk=7)
    expected = [logits(oracle, ids) for oracle, ids in zip(oracles, prompts, strict=False)]
    expected.append(tiny.expected(prompts[3]))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [{"r": 5}, {"r": 3, "use_dora": True}], ids=["lora", "dora"])
def test_quantized_base_weights(bits: int, config: dict[str, Any], tmp_path: Path) -> None:
    """The oracle has the values that the quantized weights stand for; adapters never touch them."""
    tiny = make_tiny("Llama")
    modules = dict(tiny.oracle.named_modules())
    for linear in tiny.decoder.adaptable_linears():
        parts = [quantize(modules[name].weight.data, bits) for name in linear.parts]
        for name, part in zip(linear.parts, parts, strict=True):
            modules[name].weight.data = part.dequantize()
        linear.linear.set_weight(stack(parts))
    oracle = write_adapter(tiny.oracle, tmp_path, seed=5, **config)
    put_into_slots(tiny, [tmp_path])
    ids = tokens(30)
    (found,) = run(tiny, [[1.0, 0.0, 0.0]], [ids], chunk=11)
    expected = logits(oracle, ids)
    assert (expected - tiny.expected(ids)).abs().max() > 0.1, "the adapter changes nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def quantize(weight: torch.Tensor, bits: int, group_size: int = 8) -> QuantizedWeight:
    """Round to nearest, symmetric."""
    groups = weight.view(weight.shape[0], -1, group_size)
    middle = 2 ** (bits - 1)
    scales = groups.abs().amax(-1) / (middle - 1)
    codes = (groups / scales[..., None]).round() + middle
    zero_points = torch.full(scales.shape, middle, dtype=torch.uint8)
    return QuantizedWeight(codes.view(weight.shape).to(torch.uint8), scales, zero_points, bits, group_size)


def test_a_model_without_adapters_in_its_step_is_the_base(tiny: TinyDecoder, tmp_path: Path) -> None:
    write_adapter(tiny.oracle, tmp_path, seed=1)
    put_into_slots(tiny, [tmp_path])
    ids = tokens(30)
    (found,) = tiny.run(PagedSteps(1, max_len=30, block_size=8), [ids], [[Chunk(0, 0, 30)]])
    torch.testing.assert_close(found, tiny.expected(ids), rtol=1e-4, atol=1e-4)
