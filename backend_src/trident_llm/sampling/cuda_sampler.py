"""CudaSampler: draws a step's tokens on the GPU without waiting for the host. Penalty counts live on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.flat_step import Sample
from ..engine.sequence import Sequence as EngineSequence
from ..engine.to_device import send
from ..kernels.adjust_logits import AdjustmentTensors, adjust_logits, count_tokens
from ..kernels.sample_tokens import SamplingTensors, allocate_workspace, sample_tokens
from ..kernels.token_logprobs import LogprobTensors, token_logprobs
from ..protocol import TokenLogprobs, TopLogprob
from .sampler import GREEDY_TEMPERATURE


@dataclass(frozen=True)
class DeviceSamples:
    """Tokens on their way to the host: not to be read before the step has ended."""

    token_ids: Tensor
    """[N] int64, pinned."""
    logprobs: LogprobTensors | None

    def token_logprobs(self, samples: Sequence[Sample]) -> list[TokenLogprobs | None]:
        """Per sample; None where it did not ask."""
        if self.logprobs is None:
            return [None] * len(samples)
        chosen, ranks = self.logprobs.chosen.tolist(), self.logprobs.rank.tolist()
        ids, values = self.logprobs.top_ids.tolist(), self.logprobs.top.tolist()
        token_ids = self.token_ids.tolist()
        result: list[TokenLogprobs | None] = []
        for i, entry in enumerate(samples):
            count = entry.seq.params.logprobs
            if count is None:
                result.append(None)
                continue
            top = [TopLogprob(t, v) for t, v in zip(ids[i][:count], values[i][:count], strict=True)]
            result.append(TokenLogprobs(token_ids[i], chosen[i], ranks[i], top))
        return result


class CudaSampler:
    """Holds the sampled tokens of the last step and the penalty counts of the sequences that have penalties."""

    def __init__(self, *, max_samples: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self.token_ids = torch.zeros(max_samples, dtype=torch.int64, device=device)
        """[max_samples]: the last step's tokens, which the next step's inputs may refer to."""
        self._workspace = allocate_workspace(max_samples, device)
        self._output_counts = torch.zeros(max_samples, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(max_samples, vocab_size, dtype=torch.uint8, device=device)
        self._free_slots = list(range(max_samples))
        self._slots: dict[EngineSequence, int] = {}
        self._host_ids = [torch.zeros(max_samples, dtype=torch.int64, pin_memory=self._pinned) for _ in range(2)]
        self._turn = 0

    def field_values(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """The step's sampling fields of StepBuffers."""
        params = [entry.seq.params for entry in samples]
        return {
            "seed": [_signed(p.seed) for p in params],
            "sample_index": [entry.seq.sample_index for entry in samples],
            "position": [entry.position for entry in samples],
            "row": [entry.row for entry in samples],
            "temperature": [p.temperature for p in params],
            "top_p": [p.top_p for p in params],
            "min_p": [p.min_p for p in params],
            "top_k": [p.top_k for p in params],
            "penalty_slot": self._penalty_slots(samples),
            "repetition_penalty": [p.repetition_penalty for p in params],
            "frequency_penalty": [p.frequency_penalty for p in params],
            "presence_penalty": [p.presence_penalty for p in params],
        }

    def sample(self, logits: Tensor, samples: Sequence[Sample], fields: Mapping[str, Tensor]) -> DeviceSamples:
        """Draw a token for each sample. logits [R, vocab] float32; ``fields`` are StepBuffers' views."""
        count = len(samples)
        rows = logits[:count] if _is_identity(samples) else logits.index_select(0, fields["row"][:count])
        adjusted = self._adjusted(rows, samples, fields)
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "position")
        tensors = SamplingTensors(**{name: fields[name][:count] for name in names})
        tokens = self.token_ids[:count]
        greedy = all(entry.seq.params.temperature < GREEDY_TEMPERATURE for entry in samples)
        sample_tokens(adjusted, tensors, tokens, self._workspace, greedy=greedy)
        if any(entry.seq.params.has_penalties for entry in samples):
            count_tokens(tokens, fields["penalty_slot"][:count], self._output_counts)
        return self._to_host(rows, samples)

    def forget(self, seq: EngineSequence) -> None:
        """The sequence has ended: its counts are not needed any more."""
        slot = self._slots.pop(seq, None)
        if slot is not None:
            self._free_slots.append(slot)

    def _adjusted(self, logits: Tensor, samples: Sequence[Sample], fields: Mapping[str, Tensor]) -> Tensor:
        biases = [_biases(entry) for entry in samples]
        if not any(biases) and not any(entry.seq.params.has_penalties for entry in samples):
            return logits
        count, width = len(samples), max(1, *(len(bias) for bias in biases))
        ids = [[*bias, *[0] * (width - len(bias))] for bias in biases]
        values = [[*bias.values(), *[0.0] * (width - len(bias))] for bias in biases]
        adjustment = AdjustmentTensors(
            slot=fields["penalty_slot"][:count],
            repetition_penalty=fields["repetition_penalty"][:count],
            frequency_penalty=fields["frequency_penalty"][:count],
            presence_penalty=fields["presence_penalty"][:count],
            num_biases=send([len(bias) for bias in biases], torch.int32, self._device),
            bias_ids=send(ids, torch.int32, self._device),
            bias_values=send(values, torch.float32, self._device),
        )
        out = torch.empty_like(logits, dtype=torch.float32)
        adjust_logits(logits, out, adjustment, self._output_counts, self._in_prompt)
        return out

    def _to_host(self, logits: Tensor, samples: Sequence[Sample]) -> DeviceSamples:
        count = len(samples)
        self._turn ^= 1
        host = self._host_ids[self._turn][:count]
        host.copy_(self.token_ids[:count], non_blocking=True)
        asked = [entry.seq.params.logprobs for entry in samples if entry.seq.params.logprobs is not None]
        logprobs = None
        if asked:
            found = token_logprobs(logits, self.token_ids[:count], max(asked))
            columns = (found.chosen, found.rank, found.top_ids, found.top)
            logprobs = LogprobTensors(*(self._receive(column) for column in columns))
        return DeviceSamples(host, logprobs)

    def _penalty_slots(self, samples: Sequence[Sample]) -> list[int]:
        """Each sample's line of counts; -1 without penalties."""
        penalised = [entry.seq for entry in samples if entry.seq.params.has_penalties]
        new = [seq for seq in penalised if seq not in self._slots]
        if len(new) > len(self._free_slots):
            # Preempted sequences hold lines too. One that is not in this step has no token in flight when it comes
            # back, so its line can be filled again from what the host knows.
            for seq in self._slots.keys() - set(penalised):
                self.forget(seq)
        for seq in new:
            self._fill_slot(seq)
        return [self._slots.get(entry.seq, -1) for entry in samples]

    def _fill_slot(self, seq: EngineSequence) -> None:
        """Take a line for the sequence and count what it has so far."""
        slot = self._slots[seq] = self._free_slots.pop()
        tokens = send(seq.token_ids, torch.int64, self._device)
        prompt, output = tokens[: seq.num_prompt_tokens], tokens[seq.num_prompt_tokens :]
        self._in_prompt[slot].zero_().index_fill_(0, prompt, 1)
        self._output_counts[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _receive(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return host.copy_(tensor, non_blocking=True)


def _is_identity(samples: Sequence[Sample]) -> bool:
    return all(entry.row == index for index, entry in enumerate(samples))


def _biases(entry: Sample) -> dict[int, float]:
    """What to add to single logits: the request's own biases, and -inf on stop tokens before min_tokens."""
    params, seq = entry.seq.params, entry.seq
    biases = dict(params.logit_bias)
    if entry.position - seq.num_prompt_tokens < params.min_tokens:
        biases.update(dict.fromkeys(seq.stop_ids, float("-inf")))
    return biases


def _signed(seed: int) -> int:
    """The int64 with the bits of ``seed`` modulo 2**64."""
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - 2**64 if seed >= 2**63 else seed


