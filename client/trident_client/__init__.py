"""A client for Trident: text generation over gRPC, for threads and for asyncio. Needs nothing of the server's code."""

from .aio import AsyncTridentClient
from .client import TridentClient
from .errors import BadRequest, Cancelled, EngineFailed, NotFound, Overloaded, TimedOut, TridentError
from .results import Chunk, Completion, FinishReason, Sample
from .retry import RetryPolicy
from .wire import Message, OptionValue

__all__ = [
    "AsyncTridentClient",
    "BadRequest",
    "Cancelled",
    "Chunk",
    "Completion",
    "EngineFailed",
    "FinishReason",
    "Message",
    "NotFound",
    "OptionValue",
    "Overloaded",
    "RetryPolicy",
    "Sample",
    "TimedOut",
    "TridentClient",
    "TridentError",
]
