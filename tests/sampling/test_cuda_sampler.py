"""The device sampler's bookkeeping, which needs no GPU."""

from __future__ import annotations

import torch

from trident_llm.engine.flat_step import Sample
from trident_llm.engine.sequence import Sequence
from trident_llm.protocol import SamplingParams
from trident_llm.sampling.cuda_sampler import CudaSampler


def penalised(name: str, token_ids: list[int]) -> Sample:
    seq = Sequence(
        request_id=name,
        sample_index=0,
        token_ids=token_ids,
        num_prompt_tokens=2,
        params=SamplingParams(seed=0, max_tokens=9, frequency_penalty=1.0),
        max_total_tokens=11,
        stop_ids=frozenset(),
    )
    return Sample(seq, row=0, position=len(token_ids))


def test_more_penalised_sequences_may_live_than_run_at_once():
    sampler = CudaSampler(max_samples=2, vocab_size=10, device=torch.device("cpu"))
    # With preemption, sequences that wait keep what they had: three are alive here, two in any step.
    first, second, third = penalised("a", [1, 2, 5, 5]), penalised("b", [3, 4]), penalised("c", [1, 1, 6])
    for step in ((first, second), (second, third), (third, first), (first, second)):
        slots = sampler.field_values(step)["penalty_slot"]
        assert len(set(slots)) == 2
        for sample, slot in zip(step, slots, strict=True):
            output = torch.tensor(sample.seq.token_ids[2:], dtype=torch.int64)
            assert sampler._output_counts[slot].tolist() == torch.bincount(output, minlength=10).tolist()
