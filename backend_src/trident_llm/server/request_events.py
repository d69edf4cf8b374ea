"""What happens to the requests of one door: counted on its board, and told to the log.

Knows generations; neither sockets nor the server's API.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..deaths import base_id
from ..door_board import DoorBoard
from ..errors import TridentError
from ..generation import Generation
from ..logs import RequestLog
from ..metrics_catalog import REFUSAL_CODES
from .tracing import RequestTrace

if TYPE_CHECKING:
    from .tracer import Tracer

logger = logging.getLogger(__name__)


class RequestEvents:
    """``submitted`` and ``ended`` are called with the engine client's lock held, the others by a door's own threads."""

    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        """Gets what traced requests went through."""
        self._board: DoorBoard | None = None
        self._log = RequestLog(logger)
        self._open: set[Generation] = set()

    def attach(self, folder: Path) -> None:
        """Count on a board in ``folder``, on a new one when the folder has been made anew."""
        if self._board is None or not self._board.path.exists():
            self._board = DoorBoard(folder)
            self._board.set_live(len(self._open))

    def submitted(self, generation: Generation) -> None:
        """``generation`` goes to the engine, for the first time or again."""
        event = "resubmitted" if generation in self._open else "accepted"
        self._open.add(generation)
        self._count(f"requests_{event}_total")
        num_prompt_tokens = len(generation.prompt_ids)
        request_id = base_id(generation.request_id)
        self._log.begin(event, request_id, generation.client_id, prompt_tokens=num_prompt_tokens)

    def ended(self, generation: Generation) -> None:
        """``generation`` has finished, failed or been cancelled. A second call does nothing."""
        if generation not in self._open:
            return
        self._open.remove(generation)
        reason = _reason(generation)
        self._count(f"requests_finished_total.{reason}")
        error = "" if generation.error is None else str(generation.error)
        tokens = sum(len(sample.token_ids) for sample in generation.samples)
        if self.tracer is not None and generation.trace_context:
            self.tracer.add(_trace(generation, generation.trace_context, reason))
        self._log.end("finished", base_id(generation.request_id), reason=reason, output_tokens=tokens, error=error)

    def refused(self, error: Exception, client_id: str) -> None:
        """A request got ``error`` and never was submitted."""
        code = error.code if isinstance(error, TridentError) else ""
        self._count(f"requests_refused_total.{code if code in REFUSAL_CODES else 'INTERNAL'}")
        self._log.end("refused", "", client_id=client_id, error=str(error))

    def responded(self) -> None:
        """A response was sent."""
        if self._board is not None:
            self._board.add("door_responses_total")

    def close(self) -> None:
        if self.tracer is not None:
            self.tracer.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def _count(self, key: str) -> None:
        if self._board is not None:
            self._board.add(key)
            self._board.set_live(len(self._open))


def _trace(generation: Generation, context: Mapping[str, str], reason: str) -> RequestTrace:
    """Attributes have OpenTelemetry's names for generative AI."""
    return RequestTrace(
        context=context,
        requested_at=generation.requested_at,
        started_at=generation.started_at,
        first_token_at=generation.first_token_at,
        ended_at=time.monotonic(),
        attributes={
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.max_tokens": generation.params.max_tokens,
            "gen_ai.usage.input_tokens": len(generation.prompt_ids),
            "gen_ai.usage.output_tokens": sum(len(sample.token_ids) for sample in generation.samples),
            "gen_ai.response.id": base_id(generation.request_id),
            "gen_ai.response.finish_reasons": (reason,),
            "trident.client_id": generation.client_id,
        },
        error="" if generation.error is None else str(generation.error),
    )


def _reason(generation: Generation) -> str:
    """That of the sample that ended least well."""
    reasons = {sample.finish_reason for sample in generation.samples}
    return next((reason for reason in ("error", "cancelled", "length") if reason in reasons), "stop")
