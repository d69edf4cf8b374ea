"""Admission: from a request to sequences, if the pool and the adapters allow it. Knows no queues."""

from __future__ import annotations

from ..adapters.adapter import Blend
from ..adapters.mix import MixUse
from ..adapters.resolve import AdapterResolver
from ..config import EngineConfig
from ..errors import BadRequest
from ..protocol import SampleStart, Submit
from .block_manager import BlockManager
from .loading import LoadedModel
from .sequence import Sequence

_SALT_END = b"\xff"
"""No UTF-8 has this byte: no salt can imitate an adapter."""


class Admission:
    """Loading has seen to it that the pool holds ``max_model_len`` tokens: whatever passes fits alone."""

    def __init__(self, model: LoadedModel, config: EngineConfig, blocks: BlockManager) -> None:
        self._model = model
        self._blocks = blocks
        self._resolver = AdapterResolver(model.adapters, config)
        self._eos_ids = frozenset(model.config.eos_token_ids)
        self._arrivals = 0

    def sequences(self, submit: Submit) -> list[Sequence]:
        """One per sample; each has become a user of its adapters. Raises ``BadRequest`` or ``NotFound``."""
        blend = self._resolver.resolve(submit)
        limit = self._max_tokens(blend)
        if len(submit.prompt_ids) >= limit:
            raise BadRequest(
                f"text_input: {len(submit.prompt_ids)} tokens leave no room for output; allowed: at most {limit - 1} "
                f"(max_model_len {self._model.max_model_len}, KV pool of {self._blocks.num_blocks} blocks of "
                f"{self._blocks.block_size} tokens{', two passes' if isinstance(blend, MixUse) else ''})"
            )
        sequences = [self._sequence(submit, start, blend, limit) for start in submit.samples]
        for seq in sequences:
            if self._model.adapters is not None:
                self._model.adapters.retain(seq.adapters)
        return sequences

    def _max_tokens(self, blend: Blend | MixUse | None) -> int:
        """A mix has K and V of two passes in the pool."""
        limit = self._model.max_model_len
        if isinstance(blend, MixUse):
            limit = min(limit, self._blocks.num_blocks // 2 * self._blocks.block_size)
        return limit

    def _sequence(
        self, submit: Submit, start: SampleStart, blend: Blend | MixUse | None, limit: int
    ) -> Sequence:
        params = submit.params
        self._arrivals += 1
        salt = submit.cache_salt.encode()
        seq = Sequence(
            request_id=submit.request_id,
            sample_index=start.index,
            token_ids=submit.prompt_ids + start.output_ids,
            num_prompt_tokens=len(submit.prompt_ids),
            max_total_tokens=min(len(submit.prompt_ids) + params.max_tokens, limit),
            params=params,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids),
            priority=submit.priority,
            arrival=self._arrivals,
            user=submit.user,
            salt=salt + (_SALT_END + blend.key if blend else b""),
            blend=blend,
            wants_scalings=submit.return_scalings,
            wants_layer_scalings=submit.return_layer_scalings,
            calibration=submit.calibration and not start.index,
        )
        seq.requested_at = submit.requested_at or seq.arrival_time
        if isinstance(blend, MixUse):
            seq.companion = Sequence(
                request_id=seq.request_id,
                sample_index=seq.sample_index,
                token_ids=seq.token_ids,  # the same list: what one learns both know
                num_prompt_tokens=seq.num_prompt_tokens,
                max_total_tokens=seq.max_total_tokens,
                params=params,
                stop_ids=seq.stop_ids,
                salt=salt + (_SALT_END + blend.base_key if blend.base_key else b""),
            )
            if seq.freeze_at is not None:
                # The token before the first frozen one must be computed, whatever the cache holds: its scalings stay.
                seq.cache_limit = seq.companion.cache_limit = seq.freeze_at - 1
        return seq
