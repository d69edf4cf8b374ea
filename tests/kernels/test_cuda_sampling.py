"""Sampling in the Triton language against the torch twin, and against a sort in float64 where order matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.kernels.cuda_cases import DEVICE, INTERPRETED, assert_close, random_tensor
from trident_llm.kernels.adjust_logits import AdjustmentTensors, adjust_logits, count_tokens
from trident_llm.kernels.sample_tokens import SamplingTensors, allocate_workspace, sample_tokens
from trident_llm.kernels.token_logprobs import token_logprobs
from trident_llm.protocol import SamplingParams
from trident_llm.sampling.philox import uniform
from trident_llm.sampling.sampler import SamplingRow, sample

pytestmark = pytest.mark.gpu

VOCAB = 20_000
"""Several tiles of the kernel, the last one not full."""


@dataclass(frozen=True)
class Draw:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 7
    sample_index: int = 0
    position: int = 11


def tensors(draws: list[Draw]) -> SamplingTensors:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        values = [getattr(draw, name) for draw in draws]
        if name == "seed":
            values = np.array(values, dtype=np.uint64).view(np.int64).tolist()
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return SamplingTensors(
        column("temperature", torch.float32), column("top_k", torch.int32), column("top_p", torch.float32),
        column("min_p", torch.float32), column("seed", torch.int64), column("sample_index", torch.int64),
        column("position", torch.int64),
    )  # fmt: skip


def drawn(logits: torch.Tensor, draws: list[Draw], *, greedy: bool = False) -> list[int]:
    token_ids = torch.full((len(draws),), -1, dtype=torch.int64, device=DEVICE)
    workspace = allocate_workspace(len(draws), logits.device)
    sample_tokens(logits, tensors(draws), token_ids, workspace, greedy=greedy)
    return token_ids.tolist()


def twin(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    rows = [
        SamplingRow(
            params=SamplingParams(
                seed=d.seed, max_tokens=1, temperature=d.temperature, top_k=d.top_k, top_p=d.top_p, min_p=d.min_p
            ),
            sample_index=d.sample_index,
            position=d.position,
            token_ids=[1],
            num_prompt_tokens=1,
            stop_ids=frozenset(),
        )
        for d in draws
    ]
    return sample(logits.float(), rows).token_ids


def kept_masses(row: torch.Tensor, draw: Draw) -> np.ndarray:
    """[vocab] float64: each token's mass, 0 for those that min-p, top-k and top-p remove; ties go to lower ids."""
    x = (row.float().cpu() / np.float32(draw.temperature)).double().numpy()
    mass = np.exp(x - x.max())
    if draw.min_p > 0:
        floor = (row.float().cpu() / np.float32(draw.temperature)).max() + torch.tensor(draw.min_p).log()
        mass[x < float(floor)] = 0
    order = np.argsort(-x, kind="stable")
    order = order[mass[order] > 0]
    if 0 < draw.top_k < len(x):
        order = order[: draw.top_k]
    total = mass[order].sum()
    before = np.cumsum(mass[order]) - mass[order]
    order = order[before < np.float32(draw.top_p) * total] if draw.top_p < 1 else order
    kept = np.zeros_like(mass)
    kept[order] = mass[order]
    return kept


def assert_drawn(row: torch.Tensor, draw: Draw, token: int) -> None:
    """The token is the inverse CDF, in vocabulary order, of the draw's random number, up to rounding of the sums."""
    mass = kept_masses(row, draw)
    number = uniform([draw.seed], [draw.sample_index], [draw.position])[0]
    cumulative = np.cumsum(mass) / mass.sum()
    assert mass[token] > 0, f"{draw}: token {token} is not among the kept"
    low = cumulative[token] - mass[token] / mass.sum()
    assert low - 1e-5 <= number <= cumulative[token] + 1e-5, f"{draw}: {number} is not in token {token}'s share"


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = random_tensor(3, VOCAB)
    logits[0, 12_345] = 9.0
    logits[1, [9_000, 8_191, 19_999]] = 9.0
    logits[2] = -1.0
    draws = [Draw(temperature=0.0), Draw(temperature=1e-6), Draw(temperature=0.0)]
    assert drawn(logits, draws) == [12_345, 8_191, 0]
    assert drawn(logits, [Draw()] * 3, greedy=True) == [12_345, 8_191, 0]


def test_untruncated_rows_equal_the_twin() -> None:
    draws = [
        Draw(), Draw(0.5, seed=2**63 + 5, sample_index=1), Draw(1.7, seed=2**64 - 1, position=4_000_000_000), Draw(0.0),
        Draw(min_p=0.02, seed=3), Draw(min_p=1.0, seed=4),
    ]  # fmt: skip
    logits = random_tensor(len(draws), VOCAB, scale=3.0)
    assert drawn(logits, draws) == twin(logits, draws)


TRUNCATED = [
    Draw(top_k=1), Draw(top_k=50), Draw(top_k=5_000), Draw(top_k=VOCAB - 1), Draw(top_p=0.9), Draw(top_p=1e-6),
    Draw(top_p=0.9999), Draw(top_k=40, top_p=0.8), Draw(top_k=10_000, top_p=0.95, temperature=1.3),
    Draw(top_k=20, top_p=0.7, min_p=0.05), Draw(top_k=VOCAB + 5, top_p=0.5), Draw(top_k=3, min_p=0.9),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "one"])
def test_truncated_rows_follow_the_kept_distribution(kind: str) -> None:
    logits = random_tensor(len(TRUNCATED), VOCAB, scale=2.5)
    if kind == "ties":
        logits = logits.round()
    elif kind == "flat":
        logits = torch.zeros_like(logits)
    elif kind == "one":
        logits = torch.full_like(logits, float("-inf"))
        logits[:, 777] = -3.0
    for seed in range(1 if INTERPRETED else 20):
        draws = [Draw(**{**vars(draw), "seed": seed, "position": index}) for index, draw in enumerate(TRUNCATED)]
        for row, draw, token in zip(logits, draws, drawn(logits, draws), strict=True):
            assert_drawn(row, draw, token)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_half_precision(dtype: torch.dtype) -> None:
    draws = [Draw(top_p=0.8, seed=seed) for seed in range(3)] + [Draw(seed=9), Draw(temperature=0.0)]
    logits = random_tensor(len(draws), VOCAB, scale=2.0).to(dtype)
    tokens = drawn(logits, draws)
    for row, draw, token in zip(logits[:4], draws[:4], tokens[:4], strict=True):
        assert_drawn(row, draw, token)
    assert tokens[4] == logits[4].float().argmax()


def test_logprobs() -> None:
    logits = random_tensor(4, VOCAB, scale=3.0)
    logits[2, :VOCAB // 2] = float("-inf")
    token_ids = torch.tensor([5, int(logits[1].argmax()), VOCAB - 1, 100], device=DEVICE)
    result = token_logprobs(logits, token_ids, 6)
    expected = torch.log_softmax(logits.double(), -1)
    chosen = expected.gather(1, token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(result.chosen.double(), chosen, atol=2e-5, rtol=1e-6)
    assert result.rank.tolist() == [int(n) + 1 for n in (expected > chosen[:, None]).sum(-1)]
    values, ids = torch.topk(expected, 6)
    assert torch.equal(result.top_ids, ids)
    torch.testing.assert_close(result.top.double(), values, atol=2e-5, rtol=1e-6)


def test_adjusted_logits_equal_the_twin() -> None:
    """Through the twin's own changes: greedy over adjusted logits is compared, and every value is."""
    vocab = 1_500
    logits = random_tensor(3, vocab, scale=2.0)
    counts = torch.zeros(2, vocab, dtype=torch.int32, device=DEVICE)
    prompt = torch.zeros(2, vocab, dtype=torch.uint8, device=DEVICE)
    output = torch.tensor([3, 3, 1_400, 9], device=DEVICE)
    count_tokens(output, torch.tensor([1, 1, 1, -1], dtype=torch.int32, device=DEVICE), counts)
    assert counts.sum() == 3
    assert counts[1, 3] == 2
    prompt[1, [3, 700]] = 1
    params = AdjustmentTensors(
        slot=torch.tensor([-1, 1, 0], dtype=torch.int32, device=DEVICE),
        repetition_penalty=torch.tensor([2.0, 1.5, 1.0], device=DEVICE),
        frequency_penalty=torch.tensor([2.0, 0.3, 0.0], device=DEVICE),
        presence_penalty=torch.tensor([2.0, -0.7, 0.0], device=DEVICE),
        num_biases=torch.tensor([1, 2, 0], dtype=torch.int32, device=DEVICE),
        bias_ids=torch.tensor([[8, 0], [3, 1_499], [5, 5]], dtype=torch.int32, device=DEVICE),
        bias_values=torch.tensor([[float("-inf"), 9.0], [4.0, -2.5], [9.0, 9.0]], device=DEVICE),
    )
    expected = logits.clone()
    expected[0, 8] = float("-inf")
    expected[1, 3] += 4.0
    expected[1, 1_499] -= 2.5
    seen = [3, 700, 1_400]
    expected[1, seen] = torch.where(expected[1, seen] > 0, expected[1, seen] / 1.5, expected[1, seen] * 1.5)
    expected[1, 3] -= 0.3 * 2 - 0.7
    expected[1, 1_400] -= 0.3 - 0.7
    out = torch.empty_like(logits)
    adjust_logits(logits, out, params, counts, prompt)
    finite = expected > float("-inf")
    assert torch.equal(out > float("-inf"), finite)
    assert_close(out[finite], expected[finite])


def test_an_invalid_dtype_is_named() -> None:
    with pytest.raises(TypeError, match="token_ids"):
        sample_tokens(
            random_tensor(1, 10), tensors([Draw()]), torch.zeros(1, dtype=torch.int32, device=DEVICE),
            allocate_workspace(1, torch.device(DEVICE)),
        )  # fmt: skip
