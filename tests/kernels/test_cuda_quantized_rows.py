"""Norms and SiLU that write 8 bits: the bits of the kernels that they replace, alone and in a decoder."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.fakes.lora_problems import lora_rows
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import DEVICE, HALF_DTYPES, INTERPRETED, PDL, random_tensor
from tests.kernels.test_cuda_scaled import CODES, in_order, random_weight
from trident_llm.engine.batch import ModelInput, StepAdapters
from trident_llm.engine.kv_cache import KVCache
from trident_llm.kernels import scaled_linear
from trident_llm.kernels.lora_layer import allocate_lora_layer
from trident_llm.kernels.quantize_rows import quantize_rows
from trident_llm.kernels.quantized_rows import QuantizedRows, allocate_rows
from trident_llm.kernels.reference_quantized import quantize_tokens
from trident_llm.kernels.rms_norm import NormConfig, default_config, rms_norm
from trident_llm.kernels.silu_and_mul import silu_and_mul
from trident_llm.kernels.silu_and_quantize import MAX_SIZE, SiluConfig, silu_and_quantize
from trident_llm.kernels.triton_language import TritonLanguageKernels
from trident_llm.models import llama
from trident_llm.models.llama import LlamaDecoder
from trident_llm.models.model_config import ModelConfig

pytestmark = pytest.mark.gpu

KERNELS = TritonLanguageKernels(num_processors=16, pdl=PDL)
INT8, E4M3, BF16, FP16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16
SMALL = [
    (17, 160, BF16, INT8), (17, 160, FP16, E4M3), (64, 100, BF16, E4M3), (64, 100, FP16, INT8),
    (3, 40, torch.float32, INT8), (0, 160, BF16, INT8),
]  # fmt: skip
MANY = [(300, 136, BF16, INT8)]
FORMS = ("plain", "added", "parts")
NORMS = [*itertools.product(SMALL, FORMS), *itertools.product(MANY, ("added",))]
SILUS = SMALL + MANY
if not INTERPRETED:
    NORMS += itertools.product(itertools.product((17, 64, 300, 2048), (4096,), (BF16, FP16), (INT8, E4M3)), FORMS)
    SILUS += itertools.product((17, 64, 300, 2048), (14336,), (BF16, FP16), (INT8, E4M3))
    SILUS += itertools.product((64,), (8960, 28672), (BF16, FP16), (INT8, E4M3))


def room(num_rows: int, size: int, codes: torch.dtype, dtype: torch.dtype) -> QuantizedRows:
    """Rows in which a number that is never written shows."""
    rows = allocate_rows(num_rows, size, codes, dtype=dtype, device=torch.device(DEVICE))
    rows.values.view(torch.uint8).fill_(77)
    rows.scales.fill_(float("nan"))
    return rows


def assert_same(actual: QuantizedRows, expected: QuantizedRows, *, last_bit: bool = False) -> None:
    """last_bit: whether the last one of a 16-bit number may differ."""
    assert actual.dtype == expected.dtype and actual.values.dtype == expected.values.dtype
    if last_bit:
        torch.testing.assert_close(actual.scales, expected.scales, rtol=2**-8, atol=0)
        torch.testing.assert_close(actual.values.float(), expected.values.float(), rtol=2**-3, atol=1)
        return
    assert torch.equal(actual.scales, expected.scales)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize(("case", "form"), NORMS, ids=str)
def test_a_norm_in_8_bits(case: tuple[int, int, torch.dtype, torch.dtype], form: str) -> None:
    num_rows, size, dtype, codes = case
    parts = random_tensor(3, num_rows, size, seed=1)
    x = parts if form == "parts" else parts[0].to(dtype)
    weight = random_tensor(size, dtype=dtype, seed=2)
    out, rows = torch.empty(num_rows, size, dtype=dtype, device=DEVICE), room(num_rows, size, codes, dtype)
    residuals = [None if form == "plain" else random_tensor(num_rows, size, dtype=dtype, seed=3) for _ in range(2)]
    for config in (None,) if INTERPRETED else (None, NormConfig(1, 16)):
        rms_norm(x, weight, 1e-5, out, residual=residuals[0], config=config, pdl=PDL)
        rms_norm(x, weight, 1e-5, rows, residual=residuals[1], config=config, pdl=PDL)
        # Squares of several rows a program may be added up in another order.
        several = not INTERPRETED and default_config(size, num_rows).rows > 1 and config is None
        assert_same(rows, quantize_rows(out, codes, pdl=PDL), last_bit=several)
        if residuals[0] is not None:
            assert torch.equal(residuals[0], residuals[1])


@pytest.mark.parametrize("case", SILUS, ids=str)
def test_silu_in_8_bits(case: tuple[int, int, torch.dtype, torch.dtype]) -> None:
    num_rows, size, dtype, codes = case
    gate_up = random_tensor(num_rows, 2 * size, dtype=dtype, scale=3.0)
    out = torch.empty(num_rows, size, dtype=dtype, device=DEVICE)
    silu_and_mul(gate_up, out, pdl=PDL)
    expected = quantize_rows(out, codes, pdl=PDL)
    for config in (None,) if INTERPRETED else (None, SiluConfig(16)):
        assert_same(silu_and_quantize(gate_up, codes, config=config, pdl=PDL), expected)


def test_rows_of_zeros_have_a_scale() -> None:
    zeros = torch.zeros(2, 320, dtype=FP16, device=DEVICE)
    rows = room(2, 160, INT8, FP16)
    rms_norm(zeros[:, :160], zeros[0, :160], 1e-5, rows, pdl=PDL)
    for found in (rows, silu_and_quantize(zeros, INT8, pdl=PDL)):
        assert not found.values.any() and (found.scales > 0).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_are_those_of_the_twin(dtype: torch.dtype) -> None:
    x = random_tensor(17, 160, dtype=dtype)
    rows = quantize_rows(x, INT8, pdl=PDL)
    codes, scales = quantize_tokens(x, "int8")
    # A GPU's quick division may end on the other side of a half.
    torch.testing.assert_close(rows.scales[:, None], scales, rtol=0 if INTERPRETED else 1e-6, atol=0)
    assert (in_order(rows.values, 160) - codes).abs().max() <= (0 if INTERPRETED else 1)


def test_rows_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 160, dtype=FP16, device=DEVICE)
    with pytest.raises(ValueError, match="out is"):
        rms_norm(x, x[0], 1e-5, room(4, 100, INT8, FP16))
    with pytest.raises(TypeError, match="bfloat16"):
        rms_norm(x, x[0], 1e-5, room(4, 160, INT8, BF16))
    with pytest.raises(ValueError, match=f"at most {MAX_SIZE}"):
        silu_and_quantize(torch.empty(1, 2 * MAX_SIZE + 2, dtype=FP16, device=DEVICE), INT8)


def random_decoder(codes: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> LlamaDecoder:
    """Two layers whose linear layers bring activations to 8 bits."""
    monkeypatch.setattr(llama, "kernels_for", lambda device: KERNELS)
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=40, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4,
        max_position_embeddings=64,
    )  # fmt: skip
    decoder = LlamaDecoder(config, dtype=HALF_DTYPES[-1], device=torch.device(DEVICE), max_model_len=64)
    shapes = {name: shape for target in decoder.weight_targets() for name, shape in target.parts.items()}
    decoder.load_weights(
        (name, random_weight(shape, codes) if "_proj" in name else random_tensor(*shape, seed=index))
        for index, (name, shape) in enumerate(shapes.items())
    )
    return decoder


def logits(decoder: LlamaDecoder, step: ModelInput, num_blocks: int) -> torch.Tensor:
    cache = KVCache(
        decoder.config, num_blocks=num_blocks, block_size=8, dtype=decoder.dtype, device=torch.device(DEVICE)
    )
    return decoder.forward(step, cache)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_a_decoder_computes_the_same(codes: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(codes, monkeypatch)
    steps = PagedSteps(2, max_len=64, block_size=8, device=DEVICE)
    token_ids = [[(7 * i + seq) % 40 for i in range(50)] for seq in range(2)]
    # On a GPU cuBLAS multiplies so many rows of e4m3.
    lengths = (9, 12) if INTERPRETED else (50, 20)
    step = steps.model_input(token_ids, [Chunk(seq, 0, length) for seq, length in enumerate(lengths)])
    step = dataclasses.replace(step, logits_rows=torch.tensor([sum(lengths) - 1, 8, 3], device=DEVICE))
    made_alone = []

    def counted(*arguments: object, **options: object) -> QuantizedRows:
        made_alone.append(arguments)
        return quantize_rows(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scaled_linear, "quantize_rows", counted)
    found = logits(decoder, step, steps.num_blocks)
    assert len(made_alone) == 3, "the first layer's input, and what attention writes in each"
    for adaptable in decoder.adaptable_linears():
        adaptable.linear.lora = allocate_lora_layer(
            tuple(adaptable.parts.values()), adaptable.num_inputs, first_target=0, num_slots=1, max_rank=16,
            dtype=decoder.dtype, device=torch.device(DEVICE),
        )  # fmt: skip
    no_updates = StepAdapters(*(lora_rows(torch.zeros(1, rows, 1, device=DEVICE)) for rows in (sum(lengths), 3)))
    assert torch.equal(logits(decoder, dataclasses.replace(step, adapters=no_updates), steps.num_blocks), found)
    assert len(made_alone) == 3 + 8, "updates read 16 bits"
    monkeypatch.setattr(TritonLanguageKernels, "input_codes", lambda *arguments: None)
    assert torch.equal(logits(decoder, step, steps.num_blocks), found)
    assert len(made_alone) == 3 + 8 + 8
