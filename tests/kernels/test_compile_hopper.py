"""Kernels of Hopper alone compile without a GPU, their warps have their duties, and no register lies in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.fake_hopper import FakeHopperDriver
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.compiled import CPU, assert_no_stack, empty_weight, machine_code, stack_bytes
from trident_llm.kernels.layer_cache import SCALED_LIMITS, LayerCache
from trident_llm.kernels.lora_layer import LoraRows, allocate_lora_layer
from trident_llm.kernels.quantize_rows import quantize_rows
from trident_llm.kernels.triton_language import TritonLanguageKernels

KERNELS_OF_HOPPER = TritonLanguageKernels(num_processors=132, pdl=True, hopper=True)


@pytest.mark.parametrize(
    ("heads", "block_size", "dtype"),
    [(32, 16, torch.bfloat16), (32, 16, torch.float16), (64, 32, torch.bfloat16)],
)
def test_warps_of_prefill_attention_on_hopper_have_their_duties(
    hopper: FakeHopperDriver, tmp_path: Path, heads: int, block_size: int, dtype: torch.dtype
) -> None:
    """Registers move to the attending warps, none is spilled, and exponentials run beside matrix instructions."""
    kernels = KERNELS_OF_HOPPER
    steps = PagedSteps(1, max_len=256, block_size=block_size)
    plan = kernels.plan_attention(steps.metadata([Chunk(0, 0, 200)]), dtype=dtype)
    cache = LayerCache(torch.empty(steps.num_blocks, block_size, 2, 8, 128, dtype=dtype))
    kernels.paged_attention(torch.empty(200, heads, 128, dtype=dtype), cache, plan, 0.1)
    [(name, _, shared)] = hopper.compiled
    assert name == "_hopper_prefill_attention_kernel"
    assert shared <= 227 * 1024
    assert_no_stack(hopper, name, tmp_path)
    code = machine_code(hopper, name, tmp_path)
    assert "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8" in code
    # Q for two groups of warps; a block of K and of V each, in rows of 64 elements.
    assert code.count("UTMALDG.3D") == 2 * 2
    assert code.count("UTMALDG.2D") == 2 * 2 * 128 // block_size
    # By group: first scores, two loops with scores and output, last output.
    waits = re.findall(r"WARPGROUP.DEPBAR.LE gsb0, (0x\d)|(MUFU.EX2)", code)
    order = "".join(number[-1] if number else "e" for number, _ in waits)
    exponentials = "e" * 66
    loop = f"1{exponentials}0"
    assert order == f"0{exponentials}{loop}{loop}0" * 2


@pytest.mark.parametrize(
    "changed",
    [{"soft_cap": 30.0}, {"sliding_window": 64}, {"block_size": 24}, {"head_dim": 64}, {"heads": 40},
     {"cache_dtype": torch.int8}, {"dtype": torch.float32}],
    ids=str,
)  # fmt: skip
def test_other_prompts_on_hopper_keep_the_kernel_for_all_devices(
    hopper: FakeHopperDriver, changed: dict[str, Any]
) -> None:
    case = {"soft_cap": None, "sliding_window": None, "block_size": 16, "head_dim": 128, "heads": 32,
            "dtype": torch.bfloat16} | changed  # fmt: skip
    kernels = KERNELS_OF_HOPPER
    steps = PagedSteps(1, max_len=480, block_size=case["block_size"])
    metadata = steps.metadata([Chunk(0, 0, 200)])
    plan = kernels.plan_attention(metadata, dtype=case["dtype"], sliding_window=case["sliding_window"])
    cache_dtype = case.get("cache_dtype", case["dtype"])
    values = torch.empty(steps.num_blocks, case["block_size"], 2, 8, case["head_dim"], dtype=cache_dtype)
    cache = LayerCache(values, torch.empty(values.shape[:-1]) if cache_dtype in SCALED_LIMITS else None)
    q = torch.empty(200, case["heads"], case["head_dim"], dtype=case["dtype"])
    kernels.paged_attention(q, cache, plan, 0.1, case["soft_cap"])
    assert [name for name, _, _ in hopper.compiled] == ["_prefill_attention_kernel"]


@pytest.mark.parametrize("num_rows", [16, 64, 256])
@pytest.mark.parametrize("silu", [False, True])
def test_words_are_unpacked_beside_matrix_instructions_on_hopper(
    hopper: FakeHopperDriver, tmp_path: Path, num_rows: int, silu: bool
) -> None:
    """Few registers are spilled, and a product waits for the one before last until a block's words are used up."""
    weight, x = KERNELS_OF_HOPPER.pack_linear(empty_weight(6144, 4096, 4)), torch.empty(num_rows, 4096).bfloat16()
    if silu:
        KERNELS_OF_HOPPER.linear_silu_and_mul(x, weight)
    else:
        KERNELS_OF_HOPPER.linear(x, weight)
    name, _, shared = hopper.compiled[0]
    assert name == "_hopper_quantized_matmul_kernel"
    assert shared <= 227 * 1024
    assert stack_bytes(hopper, name, tmp_path) <= 16
    code = machine_code(hopper, name, tmp_path)
    panels = 1 if num_rows == 256 else 2
    assert code.count("HGMMA") == 2 * panels * 4 * 4
    waits = "".join(re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", code))
    assert waits == f"{panels}{panels}{panels}0" * 2


@pytest.mark.parametrize("num_rows", [40, 600, 5000])
def test_an_order_of_the_inputs_is_applied_once(
    hopper: FakeHopperDriver, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    weight = replace(KERNELS_OF_HOPPER.pack_linear(empty_weight(512, 4096, 4)), input_order=torch.arange(4096))
    gather = torch.Tensor.index_select
    gathered: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, *args: gathered.append(args) or gather(x, *args))
    x, residual = torch.empty(num_rows, 4096).bfloat16(), torch.empty(num_rows, 512).bfloat16()
    KERNELS_OF_HOPPER.linear(x, weight)
    KERNELS_OF_HOPPER.linear_silu_and_mul(x, weight)
    KERNELS_OF_HOPPER.linear_add_rms_norm(x, weight, None, residual, residual[0], 1e-5)
    assert len(gathered) == 3
    assert hopper.compiled


@pytest.mark.parametrize("num_rows", [16, 300, 3000])
def test_int8_on_hopper(hopper: FakeHopperDriver, tmp_path: Path, num_rows: int) -> None:
    weight = KERNELS_OF_HOPPER.pack_linear(empty_weight(6144, 4096, 8, "int8"))
    rows = quantize_rows(torch.empty(num_rows, 4096, dtype=torch.bfloat16), torch.int8, pdl=True)
    KERNELS_OF_HOPPER.linear(rows, weight)
    names = [name for name, _, _ in hopper.compiled]
    assert names[:2] == ["_quantize_rows_kernel", "_hopper_scaled_matmul_kernel"]
    assert_no_stack(hopper, names[1], tmp_path)
    code = machine_code(hopper, names[1], tmp_path)
    assert code.count("IGMMA") >= 8
    assert "".join(re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", code)) == "1010"


@pytest.mark.parametrize("num_rows", [3, 64, 128])
def test_products_of_few_rows_on_hopper(hopper: FakeHopperDriver, tmp_path: Path, num_rows: int) -> None:
    """Each is one kernel; of two programs that follow each other on a processor the second's registers fit beside."""
    x, residual = (torch.empty(num_rows, 4096, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.empty(28672, 4096, dtype=torch.bfloat16)
    if num_rows <= 64:
        KERNELS_OF_HOPPER.linear(x, weight)
        check_product(hopper, tmp_path)
    KERNELS_OF_HOPPER.linear_silu_and_mul(x, weight)
    check_product(hopper, tmp_path)
    KERNELS_OF_HOPPER.linear_add_rms_norm(x, weight[:4096], None, residual, residual[0], 1e-5)
    assert hopper.compiled.pop()[0] == "_rms_norm_kernel"
    check_product(hopper, tmp_path)
    assert not hopper.compiled


@pytest.mark.parametrize("num_rows", [64, 128])
@pytest.mark.parametrize("part_sizes", [(4096, 1024, 1024), (14336, 14336), (4096,)], ids=["qkv", "gate-up", "o"])
def test_products_that_updates_join_on_hopper(
    hopper: FakeHopperDriver, tmp_path: Path, part_sizes: tuple[int, ...], num_rows: int
) -> None:
    """Two kernels, one with the norm that follows. With 128 rows DoRA's gains of gate and up take some memory."""
    layer = allocate_lora_layer(
        part_sizes, 4096, first_target=0, num_slots=32, max_rank=16, dtype=torch.bfloat16, device=CPU
    )
    tiles = torch.full((1 - (-num_rows // 16), 32), -1, dtype=torch.int32)
    rows = LoraRows(weights=torch.zeros(1, num_rows, 32), tile_slots=tiles)
    x, residual = (torch.empty(num_rows, 4096, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.empty(sum(part_sizes), 4096, dtype=torch.bfloat16)
    if len(part_sizes) == 3:
        KERNELS_OF_HOPPER.linear_lora(x, weight, None, layer, rows)
    elif len(part_sizes) == 2:
        KERNELS_OF_HOPPER.linear_lora_silu_and_mul(x, weight, None, layer, rows)
    else:
        KERNELS_OF_HOPPER.linear_lora_add_rms_norm(x, weight, None, residual, residual[0], 1e-5, layer, rows)
        assert hopper.compiled.pop()[0] == "_rms_norm_kernel"
    check_product(hopper, tmp_path, 192 if len(part_sizes) == 2 and num_rows == 128 else 0)
    assert [name for name, _, _ in hopper.compiled] == ["_shrink_kernel"]


def check_product(hopper: FakeHopperDriver, folder: Path, max_stack: int = 0) -> None:
    """Of the last kernel that was compiled."""
    name, _, shared = hopper.compiled.pop()
    assert name == "_hopper_matmul_kernel"
    assert shared <= 227 * 1024
    assert stack_bytes(hopper, name, folder) <= max_stack
    code = machine_code(hopper, name, folder)
    assert "UTMALDG.2D" in code and "HGMMA" in code
