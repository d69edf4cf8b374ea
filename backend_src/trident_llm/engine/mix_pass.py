"""MixPass: the first of the two passes of sequences with a mix of adapters, and the weights it gives the second.

The base model runs over their tokens alone, on the blocks of their companions; a mix's classifier turns its last hidden
states into scalings of each adapter in each module. Causal like any pass, so it is chunked and cached likewise.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adapters.mix import Mix, MixUse
from ..kernels.lora_layer import TILE_ROWS, LoraRows, SlotRun, num_tiles
from ..models.layers import AdaptableLinear
from .flat_step import FlatStep, flatten
from .scheduler import ScheduledSequence, SchedulerOutput
from .sequence import Sequence
from .to_device import send


@dataclass(frozen=True)
class _Part:
    """A sequence's share of both passes."""

    seq: Sequence
    use: MixUse
    token_row: int
    """Its first row in the second pass."""
    num_tokens: int
    base_row: int
    """Its first row in the first pass."""
    num_scaled: int
    """Rows of the first pass: the tokens before its scalings are frozen."""
    freezes: bool
    """Whether its next token is the first whose scalings are frozen."""
    samples: bool


@dataclass(frozen=True)
class MixPlan:
    """``step`` is the first pass; None where all scalings are frozen."""

    step: FlatStep | None
    parts: tuple[_Part, ...]


@dataclass(frozen=True, eq=False)
class MixWeights:
    weights: Tensor
    """[M, T, S] float32: what every token of the second pass takes of each slot, in each module of the model."""
    means: Mapping[Sequence, Tensor]
    """[1 or layers, adapters] of each sequence that samples and wants them: its last token's scalings, averaged over
    all modules or over those of each layer."""

    def mean_of(self, seq: Sequence) -> list[list[float]] | None:
        """On the host: waits for the device."""
        return self.means[seq].tolist() if seq in self.means else None


@dataclass(frozen=True)
class _Settled:
    """All that the weights of a step depend on whose scalings are frozen."""

    parts: tuple[_Part, ...]
    slots: tuple[tuple[Mix, tuple[int, ...]], ...]
    num_rows: int
    plain: bytes


def count_modules(linears: Iterable[AdaptableLinear]) -> int:
    """Modules that adapters can update."""
    return sum(len(linear.parts) for linear in linears)


def plan_mixes(
    output: SchedulerOutput, block_size: int, sampled_before: Mapping[Sequence, int]
) -> MixPlan | None:
    """The first pass of a step; None when no sequence of it has a mix."""
    paired = [item for item in output.scheduled if item.seq.companion is not None]
    if not paired:
        return None
    passes = {item.seq: _companion_item(item) for item in paired}
    scaled = sorted((entry for entry in passes.values() if entry.num_tokens), key=lambda entry: entry.num_tokens > 1)
    base_rows, end = {}, 0
    for entry in scaled:
        base_rows[entry.seq] = end
        end += entry.num_tokens
    parts, row = [], 0
    for item in output.scheduled:
        use, companion = item.seq.blend, item.seq.companion
        if companion is not None:
            assert isinstance(use, MixUse)
            num_scaled = passes[item.seq].num_tokens
            parts.append(
                _Part(
                    seq=item.seq, use=use, token_row=row, num_tokens=item.num_tokens,
                    base_row=base_rows.get(companion, 0), num_scaled=num_scaled,
                    freezes=num_scaled > 0 and item.start + num_scaled == item.seq.freeze_at,
                    samples=bool(item.sampled),
                )
            )  # fmt: skip
        row += item.num_tokens
    step = _flatten_companions(scaled, block_size, paired, sampled_before) if scaled else None
    return MixPlan(step, tuple(parts))


def _companion_item(item: ScheduledSequence) -> ScheduledSequence:
    """The part of ``item`` whose scalings are found in this step."""
    assert item.seq.companion is not None
    end = item.start + item.num_tokens
    if item.seq.freeze_at is not None:
        end = min(end, max(item.seq.freeze_at, item.start))
    return ScheduledSequence(item.seq.companion, item.start, end - item.start, (), item.num_stored)


def _flatten_companions(
    scaled: list[ScheduledSequence],
    block_size: int,
    paired: list[ScheduledSequence],
    sampled_before: Mapping[Sequence, int],
) -> FlatStep:
    """Every row's hidden state is wanted, and nothing is written where blocks hold it already."""
    sources = {
        item.seq.companion: sampled_before[item.seq]
        for item in paired
        if item.seq.companion is not None and item.seq in sampled_before
    }
    step = flatten(scaled, block_size, sources)
    stored = np.repeat([entry.num_stored for entry in scaled], [entry.num_tokens for entry in scaled])
    return dataclasses.replace(
        step,
        slots=np.where(step.positions < stored, -1, step.slots),
        logits_rows=list(range(len(step.token_ids))),
    )


class MixPass:
    """Keeps the scalings of sequences that have frozen them. ``modules``: that adapters can update."""

    def __init__(self, *, num_slots: int, num_modules: int, device: torch.device) -> None:
        self._num_slots = num_slots
        self.num_modules = num_modules
        self._device = device
        self._frozen: dict[Sequence, Tensor] = {}
        """[modules or 1, adapters] of each."""
        self._settled: tuple[_Settled, MixWeights] | None = None
        """The last step's weights, if all of its scalings were frozen."""

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._frozen.pop(seq, None)
        self._settled = None

    def pass_rows(self, plan: MixPlan) -> LoraRows | None:
        """What the rows of the first pass take; None where all of them take nothing."""
        if not any(part.use.mix.config.pass_scaling for part in plan.parts if part.num_scaled):
            return None
        assert plan.step is not None
        num_rows = len(plan.step.token_ids)
        weights = torch.zeros(1, num_rows, self._num_slots, device=self._device)
        runs, tiles = [], np.full((1 + num_tiles(num_rows), self._num_slots), -1, dtype=np.int32)
        for part in plan.parts:
            mix, start, end = part.use.mix, part.base_row, part.base_row + part.num_scaled
            if not part.num_scaled or not mix.config.pass_scaling:
                continue
            same = torch.full((1, 1, len(mix.members)), mix.config.pass_scaling, device=self._device)
            scalings = mix.classifier.select(same, send([part.use.top_k], torch.int64, self._device))
            slots = _slots(mix)
            weights[0, start:end, slots] = scalings[0, 0] * part.use.factor
            runs += [SlotRun(slot, start, end, None) for slot in slots]
            tiles[0, slots] = slots
            for tile in tiles[1 + start // TILE_ROWS : 1 + num_tiles(end)]:
                used = [*tile[tile >= 0], *(slot for slot in slots if slot not in tile)]
                tile[: len(used)] = used
        return LoraRows(weights, torch.from_numpy(tiles).to(self._device), tuple(runs))

    def weights(
        self, plan: MixPlan, hidden: Tensor | None, plain: Tensor, plain_on_host: NDArray[np.float32]
    ) -> MixWeights:
        """hidden: [rows of the first pass, H]. plain: [T, S], what tokens without a mix take; the host's has no rows
        of padding. The result is the one of the step before, the same object, where nothing of it has changed."""
        if plan.step is not None:
            self._settled = None
            return self._find(plan, hidden, plain)
        slots = tuple((mix, tuple(_slots(mix))) for mix in dict.fromkeys(part.use.mix for part in plan.parts))
        own = _Settled(plan.parts, slots, plain.shape[0], plain_on_host.tobytes())
        if self._settled is None or self._settled[0] != own:
            self._settled = own, self._find(plan, None, plain)
        return self._settled[1]

    def _find(self, plan: MixPlan, hidden: Tensor | None, plain: Tensor) -> MixWeights:
        weights = plain.expand(self.num_modules, *plain.shape).clone()
        means: dict[Sequence, Tensor] = {}
        by_mix: dict[Mix, list[_Part]] = defaultdict(list)
        for part in plan.parts:
            by_mix[part.use.mix].append(part)
        for mix, parts in by_mix.items():
            scaled = [part for part in parts if part.num_scaled]
            if scaled and hidden is not None:
                scalings = self._scalings(mix, scaled, hidden)
                self._keep(scaled, scalings)
                rows = [part.token_row + offset for part in scaled for offset in range(part.num_scaled)]
                factors = [part.use.factor for part in scaled for _ in range(part.num_scaled)]
                self._put(weights, mix, rows, factors, scalings)
                means |= _means(mix, scaled, scalings)
            frozen = [part for part in parts if part.num_scaled < part.num_tokens]
            if frozen:
                kept = torch.stack([self._frozen[part.seq] for part in frozen])
                self._put_frozen(weights, mix, frozen, kept)
                means |= _means(mix, [dataclasses.replace(part, num_scaled=1) for part in frozen], kept)
        return MixWeights(weights, means)

    def _scalings(self, mix: Mix, scaled: list[_Part], hidden: Tensor) -> Tensor:
        """[rows of the parts in the first pass, modules or 1, adapters]."""
        rows = [part.base_row + offset for part in scaled for offset in range(part.num_scaled)]
        temperatures = [part.use.temperature for part in scaled for _ in range(part.num_scaled)]
        top_k = [part.use.top_k for part in scaled for _ in range(part.num_scaled)]
        return mix.classifier.scalings(
            hidden.index_select(0, send(rows, torch.int64, self._device)),
            send(temperatures, torch.float32, self._device),
            send(top_k, torch.int64, self._device),
        )

    def _keep(self, scaled: list[_Part], scalings: Tensor) -> None:
        """Remember the scalings of sequences whose next token is the first frozen one."""
        end = 0
        for part in scaled:
            end += part.num_scaled
            if part.freezes:
                self._frozen[part.seq] = scalings[end - 1].clone()

    def _put_frozen(self, weights: Tensor, mix: Mix, frozen: list[_Part], kept: Tensor) -> None:
        """kept: [parts, modules or 1, adapters]."""
        rows: list[int] = []
        owners: list[int] = []
        factors: list[float] = []
        for index, part in enumerate(frozen):
            count = part.num_tokens - part.num_scaled
            rows += range(part.token_row + part.num_scaled, part.token_row + part.num_tokens)
            owners += [index] * count
            factors += [part.use.factor] * count
        self._put(weights, mix, rows, factors, kept.index_select(0, send(owners, torch.int64, self._device)))

    def _put(self, weights: Tensor, mix: Mix, rows: list[int], factors: list[float], scalings: Tensor) -> None:
        """Write scalings [rows, modules or 1, adapters] times their factors to ``weights`` [M, T, S]."""
        if scalings.shape[1] > 1:
            scalings = scalings.index_select(1, mix.classifier.module_rows)
        scalings = scalings * send(factors, torch.float32, self._device)[:, None, None]
        own_rows, slots = (send(values, torch.int64, self._device) for values in (rows, _slots(mix)))
        weights[:, own_rows[:, None], slots[None, :]] = scalings.transpose(0, 1)


def _means(mix: Mix, parts: list[_Part], scalings: Tensor) -> dict[Sequence, Tensor]:
    """See ``MixWeights``; ``scalings``: of the parts' tokens, one after another."""
    means, end = {}, 0
    for part in parts:
        end += part.num_scaled
        # A part whose last token is frozen has its scalings among the frozen ones.
        if not part.samples:
            continue
        if part.seq.wants_layer_scalings:
            means[part.seq] = mix.classifier.by_layer(scalings[end - 1])
        elif part.seq.wants_scalings:
            means[part.seq] = scalings[end - 1].mean(0, keepdim=True)
    return means


def _slots(mix: Mix) -> list[int]:
    slots = [member.slot for member in mix.members]
    assert None not in slots, f"a member of {mix.name} has no slot"
    return [slot for slot in slots if slot is not None]
