"""TritonLanguageKernels as a whole against the torch twin: mixed steps, linear layers of any size."""

from __future__ import annotations

import pytest
import torch

from tests.fakes.layer_caches import layer_cache
from tests.fakes.paged_steps import Chunk, PagedSteps
from tests.kernels.cuda_cases import DEVICE, HALF_DTYPES, PDL, assert_close, random_tensor
from trident_llm.kernels import reference
from trident_llm.kernels.triton_language import TritonLanguageKernels

pytestmark = pytest.mark.gpu

@pytest.fixture(scope="module")
def kernels() -> TritonLanguageKernels:
    return TritonLanguageKernels(num_processors=16, pdl=PDL)


HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
MIXED = [Chunk(0, 70, 1), Chunk(1, 4, 1), Chunk(2, 0, 1), Chunk(3, 0, 17), Chunk(4, 30, 33), Chunk(5, 0, 60)]


def attend(
    kernels: object, chunks: list[Chunk], window: int | None, cache_dtype: torch.dtype, device: str
) -> torch.Tensor:
    steps = PagedSteps(6, max_len=160, block_size=16, device=device)
    plan = kernels.plan_attention(steps.metadata(chunks), dtype=torch.float32, sliding_window=window)
    cache = layer_cache(random_tensor(steps.num_blocks, 16, 2, KV_HEADS, HEAD_DIM).to(device), cache_dtype)
    q = random_tensor(sum(c.num_tokens for c in chunks), HEADS, HEAD_DIM, seed=1).to(device)
    return kernels.paged_attention(q, cache, plan, HEAD_DIM**-0.5)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("chunks", [MIXED, MIXED[:3], MIXED[3:]], ids=["mixed", "decodes", "prompts"])
def test_a_step_equals_the_twin(
    kernels: TritonLanguageKernels, chunks: list[Chunk], window: int | None, cache_dtype: torch.dtype
) -> None:
    # The twin runs on the CPU: on a GPU scaled_dot_product_attention wants masks that start at multiples of 16 bytes.
    expected = attend(reference, chunks, window, cache_dtype, "cpu")
    assert_close(attend(kernels, chunks, window, cache_dtype, DEVICE).cpu(), expected)


@pytest.mark.parametrize("num_rows", [1, 4, 5, 16, 17])
def test_linear_for_any_number_of_rows(kernels: TritonLanguageKernels, num_rows: int) -> None:
    dtype = HALF_DTYPES[-1]
    x, weight = random_tensor(num_rows, 256, dtype=dtype), random_tensor(34, 256, dtype=dtype, seed=1, scale=0.1)
    bias = random_tensor(34, dtype=dtype, seed=2)
    product = x.double() @ weight.double().T
    packed = kernels.pack_linear(weight)
    assert_close(kernels.linear(x, packed), product)
    assert_close(kernels.linear(x, packed, bias), product + bias.double())
    gate, up = product.chunk(2, -1)
    assert_close(kernels.linear_silu_and_mul(x, packed), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_inputs"), [(1, 256), (2, 256), (5, 1024), (40, 1024), (70, 256)])
def test_linear_add_rms_norm_equals_two_steps(
    kernels: TritonLanguageKernels, num_rows: int, num_inputs: int, with_bias: bool
) -> None:
    dtype = HALF_DTYPES[-1]
    x, weight = random_tensor(num_rows, num_inputs, dtype=dtype), random_tensor(48, num_inputs, dtype=dtype, seed=1)
    residual, norm = random_tensor(num_rows, 48, dtype=dtype, seed=2), random_tensor(48, dtype=dtype, seed=3)
    bias = random_tensor(48, dtype=dtype, seed=4) if with_bias else None
    expected_residual = residual.clone()
    expected = reference.linear_add_rms_norm(x, weight, bias, expected_residual, norm, 1e-5)
    packed = kernels.pack_linear(weight)
    assert_close(kernels.linear_add_rms_norm(x, packed, bias, residual, norm, 1e-5), expected.double())
    assert_close(residual, expected_residual.double())


def test_linear_in_float32_keeps_its_precision(kernels: TritonLanguageKernels) -> None:
    x, weight = random_tensor(3, 512), random_tensor(40, 512, seed=1)
    assert_close(kernels.linear(x, weight), x.double() @ weight.double().T)
