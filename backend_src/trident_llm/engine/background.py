"""Background: what goes on beside the steps, adapters that are read and weights that are made, and their commands.

It advances between two steps. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.commands import AdapterCommands
from ..adapters.sources import AdapterSources
from ..commands import ADAPTER_COMMANDS
from ..config import EngineConfig
from ..errors import TridentError
from ..quantization.live_text import LiveText
from .jobs import Jobs
from .loading import LoadedModel
from .requantize import Requantizer
from .weight_commands import WeightCommands


class Background:
    """``config``: the settings in force. ``requantizer``: of the engine that serves ``model``."""

    def __init__(self, config: Callable[[], EngineConfig], model: LoadedModel, requantizer: Requantizer) -> None:
        self._adapters = model.adapters
        self._requantizer = requantizer
        self._weight_commands = WeightCommands(requantizer, config, model.source.quantization)
        sources = AdapterSources(config().adapter_root, config().allow_hub_adapters)
        self._adapter_commands = AdapterCommands(model.adapters, sources)

    def run(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Begin one of ``commands``; ``poll`` brings its end."""
        commands = self._adapter_commands if command in ADAPTER_COMMANDS else self._weight_commands
        return commands.run(command, arguments)

    @property
    def is_busy(self) -> bool:
        """Whether ``poll`` will soon have something to do."""
        return self._requantizer.is_busy or (self._adapters is not None and self._adapters.is_busy)

    def poll(self) -> list[tuple[Adapter, TridentError]]:
        """Take over what other threads have finished; returns adapters that could not be read again, and why."""
        lost = self._adapters.poll() if self._adapters else []
        self._requantizer.poll()
        return lost

    @property
    def jobs(self) -> Jobs:
        """Those that give the model other weights."""
        return self._requantizer.jobs

    @property
    def live_text(self) -> LiveText:
        """What ``calibrate`` has collected."""
        return self._weight_commands.live_text

    def close(self) -> None:
        """End the threads."""
        self._requantizer.close()
        if self._adapters:
            self._adapters.close()
