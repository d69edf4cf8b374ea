"""Every launcher compiles its kernel for Hopper, without a GPU, and none asks for more than the chip has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fakes.fake_hopper import FakeHopperDriver
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.compiled import CPU, assert_no_stack, empty_weight, machine_code
from trident_llm.kernels.adjust_logits import AdjustmentTensors, adjust_logits, count_tokens
from trident_llm.kernels.layer_cache import SCALED_LIMITS, LayerCache
from trident_llm.kernels.lora import add_lora
from trident_llm.kernels.lora_layer import LoraRows, allocate_lora_layer
from trident_llm.kernels.quantize_rows import quantize_rows
from trident_llm.kernels.quantized_rows import allocate_rows
from trident_llm.kernels.quantized_weight import BITS, Activations
from trident_llm.kernels.rms_norm import rms_norm
from trident_llm.kernels.sample_tokens import SamplingTensors, allocate_workspace, sample_tokens
from trident_llm.kernels.scaled_matmul import scaled_matmul
from trident_llm.kernels.silu_and_quantize import MAX_SIZE, silu_and_quantize
from trident_llm.kernels.token_logprobs import token_logprobs
from trident_llm.kernels.triton_language import TritonLanguageKernels

KERNELS = TritonLanguageKernels(num_processors=132, pdl=True)


@pytest.mark.parametrize("long_contexts", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "cache_dtype", "window"),
    [
        (32, 8, 128, torch.bfloat16, torch.bfloat16, None),
        (32, 8, 128, torch.bfloat16, torch.float8_e4m3fn, None),
        (32, 8, 128, torch.bfloat16, torch.int8, None),
        (32, 32, 80, torch.float16, torch.float8_e4m3fn, 256),
        (8, 4, 256, torch.bfloat16, torch.int8, 256),
        (9, 3, 64, torch.float32, torch.int8, None),
        (9, 3, 64, torch.float32, torch.float32, None),
        (32, 32, 80, torch.float16, torch.float16, 256),
        (8, 4, 256, torch.bfloat16, torch.bfloat16, 256),
    ],
)
def test_attention(
    hopper: FakeHopperDriver, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype,
    window: int | None, long_contexts: bool,
) -> None:  # fmt: skip
    steps = PagedSteps(3, max_len=512, block_size=16)
    chunks = [Chunk(0, 500, 1), Chunk(1, 9, 1), Chunk(2, 480, 20) if long_contexts else Chunk(2, 0, 300)]
    metadata = replace(steps.metadata(chunks), long_contexts=long_contexts)
    plan = KERNELS.plan_attention(metadata, dtype=dtype, sliding_window=window)
    values = torch.empty(steps.num_blocks, 16, 2, kv_heads, head_dim, dtype=cache_dtype)
    cache = LayerCache(values, torch.empty(values.shape[:-1]) if cache_dtype in SCALED_LIMITS else None)
    qkv = torch.empty(len(metadata.slot_mapping), heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos = torch.empty(len(qkv), 1, head_dim, dtype=dtype)
    KERNELS.rotary_embed_and_store_kv(qkv, cos, cos, cache, plan)
    KERNELS.paged_attention(qkv[:, :heads], cache, plan, 0.1, 30.0 if window else None)
    assert [name for name, _, _ in hopper.compiled] == [
        "_rotary_store_kernel", "_split_attention_kernel", "_combine_splits_kernel", "_prefill_attention_kernel",
        *(["_combine_prefill_splits_kernel"] if long_contexts else []),
    ]  # fmt: skip


@pytest.mark.parametrize("long_contexts", [False, True])
def test_matrix_instructions_of_prefill_attention_overlap(
    hopper: FakeHopperDriver, tmp_path: Path, long_contexts: bool
) -> None:
    """Where ptxas serializes them, every one is followed by a wait of its own."""
    steps = PagedSteps(1, max_len=256, block_size=16)
    metadata = replace(steps.metadata([Chunk(0, 0, 200)]), long_contexts=long_contexts)
    plan = KERNELS.plan_attention(metadata, dtype=torch.bfloat16)
    cache = LayerCache(torch.empty(steps.num_blocks, 16, 2, 8, 128, dtype=torch.bfloat16))
    KERNELS.paged_attention(torch.empty(200, 32, 128, dtype=torch.bfloat16), cache, plan, 0.1)
    assert ("_combine_prefill_splits_kernel" in hopper.machine_code) == long_contexts
    code = machine_code(hopper, "_prefill_attention_kernel", tmp_path)
    assert code.count("HGMMA") >= 16
    assert code.count("WARPGROUP.DEPBAR") < code.count("HGMMA") // 2


@pytest.mark.parametrize("num_rows", [1, 4, 8, 64])
@pytest.mark.parametrize("num_inputs", [4096, 14336])
def test_linear(hopper: FakeHopperDriver, num_rows: int, num_inputs: int) -> None:
    x, weight = (torch.empty(n, num_inputs, dtype=torch.bfloat16) for n in (num_rows, 256))
    KERNELS.linear(x, weight)
    KERNELS.linear_silu_and_mul(x, weight)
    assert hopper.compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_linear(hopper: FakeHopperDriver, bits: int, dtype: torch.dtype) -> None:
    weight = KERNELS.pack_linear(empty_weight(512, 4096, bits))
    residual, norm = torch.empty(600, 512, dtype=dtype), torch.empty(512, dtype=dtype)
    for num_rows in (1, 40, 300):
        x = torch.empty(num_rows, 4096, dtype=dtype)
        KERNELS.linear(x, weight)
        KERNELS.linear_silu_and_mul(x, weight)
        KERNELS.linear_add_rms_norm(x, weight, None, residual[:num_rows], norm, 1e-5)
    KERNELS.linear(torch.empty(600, 4096, dtype=dtype), weight)
    expected = {"_quantized_matmul_kernel", "_sum_parts_kernel", "_silu_and_mul_kernel", "_rms_norm_kernel",
                "_unpack_weight_kernel"}  # fmt: skip
    assert {name for name, _, _ in hopper.compiled} == expected | (
        {"_quantized_vector_kernel"} if bits in (4, 8) else set()
    )


def test_words_of_few_rows_go_straight_to_the_matrix_instruction(hopper: FakeHopperDriver, tmp_path: Path) -> None:
    """Loads of 16 bytes, and shared memory for nothing but the warps' sums."""
    KERNELS.linear(torch.empty(1, 4096, dtype=torch.bfloat16), KERNELS.pack_linear(empty_weight(512, 4096, 4)))
    [(name, _, shared)] = hopper.compiled
    assert shared <= 4 * 16 * 8 * 4
    code = machine_code(hopper, name, tmp_path)
    # 16 blocks of 256 inputs over 4 warps, 16 outputs: two loads of 16 bytes a block and row half.
    assert code.count("LDG.E.EF.128") == 4 * 4
    assert code.count("HMMA.16816") == 4 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_scaled_linear(hopper: FakeHopperDriver, activations: Activations, dtype: torch.dtype) -> None:
    weight = KERNELS.pack_linear(empty_weight(512, 4096, 8, activations))
    for num_rows in (1, 40):
        KERNELS.linear(torch.empty(num_rows, 4096, dtype=dtype), weight)
        KERNELS.linear_silu_and_mul(torch.empty(num_rows, 4096, dtype=dtype), weight)
    rows = quantize_rows(torch.empty(300, 4096, dtype=dtype), weight.codes.dtype, pdl=True)
    scaled_matmul(rows, weight, torch.empty(300, 512, dtype=dtype), pdl=True)
    assert {name for name, _, _ in hopper.compiled} == {
        "_quantized_vector_kernel", "_quantize_rows_kernel", "_scaled_matmul_kernel", "_silu_and_mul_kernel"
    }  # fmt: skip


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_that_become_8_bits_stay_in_registers(
    hopper: FakeHopperDriver, tmp_path: Path, codes: torch.dtype
) -> None:
    """None of a thread's local memory is used."""
    dtype = torch.bfloat16
    for size in (4096, 14336):
        residual, rows = torch.empty(64, size, dtype=dtype), allocate_rows(64, size, codes, dtype=dtype, device=CPU)
        rms_norm(residual, residual[0], 1e-5, rows, residual=residual.clone(), pdl=True)
    assert_no_stack(hopper, "_rms_norm_kernel", tmp_path)
    for size in (14336, MAX_SIZE):
        silu_and_quantize(torch.empty(64, 2 * size, dtype=dtype), codes, pdl=True)
        assert_no_stack(hopper, "_silu_and_quantize_kernel", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part_sizes", [(4096, 1024, 1024), (14336, 14336), (4096,)], ids=["qkv", "gate-up", "o"])
def test_lora(hopper: FakeHopperDriver, part_sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = allocate_lora_layer(
        part_sizes, 4096, first_target=0, num_slots=2, max_rank=64, dtype=dtype, device=CPU
    )
    rows = LoraRows(weights=torch.zeros(1, 20, 2), tile_slots=torch.full((3, 2), -1, dtype=torch.int32))
    x, y = torch.empty(20, 4096, dtype=dtype), torch.empty(20, sum(part_sizes), dtype=dtype)
    for bias in (None, y[0]):
        add_lora(y, x, bias, layer, rows, pdl=True)
    assert {name for name, _, _ in hopper.compiled} == {"_shrink_kernel", "_expand_kernel"}


@pytest.mark.parametrize(
    ("part_sizes", "num_rows"),
    [
        ((4096, 1024, 1024), 16), ((4096, 1024, 1024), 64), ((14336, 14336), 16), ((14336, 14336), 64),
        ((14336, 14336), 100), ((4096,), 16), ((4096,), 64), ((4096,), 100),
    ],
)  # fmt: skip
def test_products_that_updates_join(
    hopper: FakeHopperDriver, tmp_path: Path, part_sizes: tuple[int, ...], num_rows: int
) -> None:
    """Two kernels, one with the norm that follows, and no register in memory."""
    num_inputs, num_outputs = (4096, sum(part_sizes)) if len(part_sizes) > 1 else (14336, 4096)
    layer = allocate_lora_layer(
        part_sizes, num_inputs, first_target=0, num_slots=32, max_rank=16, dtype=torch.bfloat16, device=CPU
    )
    tiles = torch.full((1 - (-num_rows // 16), 32), -1, dtype=torch.int32)
    rows = LoraRows(weights=torch.zeros(1, num_rows, 32), tile_slots=tiles)
    x = torch.empty(num_rows, num_inputs, dtype=torch.bfloat16)
    weight = torch.empty(num_outputs, num_inputs, dtype=torch.bfloat16)
    if len(part_sizes) == 3:
        KERNELS.linear_lora(x, weight, None, layer, rows)
    elif len(part_sizes) == 2:
        KERNELS.linear_lora_silu_and_mul(x, weight, None, layer, rows)
    else:
        residual = torch.empty(num_rows, num_outputs, dtype=torch.bfloat16)
        KERNELS.linear_lora_add_rms_norm(x, weight, None, residual, residual[0], 1e-5, layer, rows)
    names = [name for name, _, _ in hopper.compiled]
    assert names[:2] == ["_shrink_kernel", "_skinny_matmul_kernel"]
    assert names[2:] == (["_rms_norm_kernel"] if len(part_sizes) == 1 else [])
    assert_no_stack(hopper, "_skinny_matmul_kernel", tmp_path)


@pytest.mark.parametrize("max_rank", [8, 16, 32, 64])
def test_updates_that_join_a_product_are_read_16_bytes_at_a_time(
    hopper: FakeHopperDriver, tmp_path: Path, max_rank: int
) -> None:
    """Whatever is left out of them: a mask that could change within 16 bytes would part them."""
    layer = allocate_lora_layer(
        (4096,), 4096, first_target=0, num_slots=8, max_rank=max_rank, dtype=torch.bfloat16, device=CPU
    )
    rows = LoraRows(weights=torch.zeros(1, 64, 8), tile_slots=torch.full((5, 8), -1, dtype=torch.int32))
    x, weight = torch.empty(64, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    KERNELS.linear_lora(x, weight, None, layer, rows)
    code = machine_code(hopper, "_skinny_matmul_kernel", tmp_path)
    assert "LDGSTS.E.BYPASS.128" in code
    assert "LDG.E.U16" not in code and "LDGSTS.E.BYPASS " not in code


def test_elementwise(hopper: FakeHopperDriver) -> None:
    x, weight = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    KERNELS.rms_norm(x, weight, 1e-5)
    KERNELS.fused_add_rms_norm(x, x.clone(), weight, 1e-5)
    KERNELS.rms_norm(torch.empty(4, 8, 128, dtype=torch.bfloat16), weight[:128], 1e-6)
    KERNELS.silu_and_mul(x)
    assert len(hopper.compiled) == 4


def test_sampling(hopper: FakeHopperDriver) -> None:
    logits, ints, floats = torch.empty(4, 32000), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    params = SamplingTensors(floats, ints.int(), floats, floats, ints, ints, ints)
    for greedy in (True, False):
        sample_tokens(logits, params, ints, allocate_workspace(4, logits.device), greedy=greedy)
    token_logprobs(logits, ints, 3)
    adjustment = AdjustmentTensors(
        ints.int(), floats, floats, floats, ints.int(), torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, 8)
    )
    counts = torch.zeros(4, 32000, dtype=torch.int32)
    adjust_logits(logits, torch.empty_like(logits), adjustment, counts, counts.to(torch.uint8))
    count_tokens(ints, replace(params, top_k=ints.int()).top_k, counts)
    assert len(hopper.compiled) == 5
