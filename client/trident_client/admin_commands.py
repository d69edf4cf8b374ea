"""AdminCommands: the commands of the admin door as methods, the same for both clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer", covariant=True)


class AdminCommands(ABC, Generic[Answer]):
    """``Answer``: a JSON object, or what one is awaited of. ``timeout`` is in seconds."""

    @abstractmethod
    def admin(self, command: str, *, timeout: float | None = None, **arguments: Any) -> Answer:
        """Run a command of the admin door and return its result. Never retried: commands may change things."""

    def stats(self) -> Answer:
        """Counters and gauges of the engine."""
        return self.admin("stats")

    def health(self) -> Answer:
        """The state of the engine, whatever the Triton server thinks of its models."""
        return self.admin("health")

    def load_adapter(self, name: str, path: str, *, pinned: bool = False, timeout: float | None = None) -> Answer:
        """Load a LoRA adapter, or put it in the place of the one that has its name: requests from now on get it.

        ``path``: a folder below the server's setting ``adapter_root``, or a Hugging Face id where it allows them.
        ``pinned``: the last to leave the device when it is not in use. A failed load changes nothing.
        """
        return self.admin("load_adapter", timeout=timeout, name=name, path=path, pinned=pinned)

    def load_xlora(self, path: str, *, name: str = "xlora", timeout: float | None = None) -> Answer:
        """Load an X-LoRA mix with its members; requests use the one named ``xlora`` unless they say otherwise."""
        return self.admin("load_xlora", timeout=timeout, path=path, name=name)

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> Answer:
        """Take an adapter's name away; requests that run with it keep it to their end."""
        return self.admin("unload_adapter", timeout=timeout, name=name)

    def list_adapters(self, *, timeout: float | None = None) -> Answer:
        """The loaded adapters, and the number of slots on the device."""
        return self.admin("list_adapters", timeout=timeout)

    def requantize(self, settings: Mapping[str, Any], *, timeout: float | None = None) -> Answer:
        """Begin to give the model weights of other ``isq_`` settings, and return the job; an empty value is a default.

        Running requests finish on the old weights, and others wait meanwhile. A failure leaves the old ones.
        """
        return self.admin("requantize", timeout=timeout, settings=dict(settings))

    def calibrate(self, action: str, *, timeout: float | None = None, **arguments: Any) -> Answer:
        """``start`` (max_samples, max_length) collects tokens of requests with the option ``calibration``, and ``stop``
        ends that; ``apply`` (settings) begins a requantize that is calibrated on them, and returns the job.
        """
        return self.admin("calibrate", timeout=timeout, action=action, **arguments)

    def job(self, job_id: str, *, timeout: float | None = None) -> Answer:
        """How a job stands: state (running, done or failed), progress, error, seconds."""
        return self.admin("job", timeout=timeout, id=job_id)
