"""The commands of ``llm_admin`` that are about weights: requantize, calibrate on live traffic, and how jobs stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ..commands import check_arguments
from ..config import EngineConfig
from ..errors import BadRequest, TridentError
from ..quantization.live_text import LiveText
from ..quantization.loading import Quantization
from .requantize import Requantizer, Wanted, isq_settings

_ARGUMENTS_OF = {"start": ("max_samples", "max_length"), "stop": (), "apply": ("settings",)}
"""Of each action of calibrate."""


class WeightCommands:
    """``config``: the settings in force. ``quantization``: what settings come to for this model."""

    def __init__(
        self,
        requantizer: Requantizer,
        config: Callable[[], EngineConfig],
        quantization: Callable[[EngineConfig], Quantization],
    ) -> None:
        self._requantizer = requantizer
        self._config = config
        self._quantization = quantization
        self.live_text = LiveText()

    def run(self, command: str, arguments: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Begin; between steps. The future holds the result, or the error."""
        result: Future[dict[str, Any]] = Future()
        try:
            check_arguments(command, arguments)
            if command == "requantize":
                config = changed_settings(self._config(), arguments["settings"])
                return self._requantizer.begin(Wanted(command, config))
            if command == "calibrate":
                return self._calibrate(**arguments)
            jobs = self._requantizer.jobs
            result.set_result(
                {"jobs": jobs.describe()} if command == "jobs" else jobs.find(arguments["id"]).describe()
            )
        except TridentError as error:
            result.set_exception(error)
        return result

    def _calibrate(self, action: str, **arguments: Any) -> Future[dict[str, Any]]:
        if action not in _ARGUMENTS_OF:
            raise BadRequest(f"action: {action!r} is not one of {', '.join(_ARGUMENTS_OF)}")
        for name in arguments:
            if name not in _ARGUMENTS_OF[action]:
                allowed = ", ".join(("action", *_ARGUMENTS_OF[action]))
                raise BadRequest(f"arguments: {name!r} is not an argument of calibrate {action}; allowed: {allowed}")
        if action == "apply":
            return self._apply(**arguments)
        result: Future[dict[str, Any]] = Future()
        result.set_result(self.live_text.start(**arguments) if action == "start" else self.live_text.stop())
        return result

    def _apply(self, settings: Mapping[str, Any] | None = None) -> Future[dict[str, Any]]:
        config = changed_settings(self._config(), settings) if settings else self._config()
        if not self._quantization(config).needs_calibration:
            raise BadRequest(
                f"calibrate: isq_method {config.isq_method} calibrates nothing; give settings with awq, gptq or "
                "smoothquant, or with isq_max_loss"
            )
        if not config.isq_cache:
            raise BadRequest(
                "calibrate: isq_cache is false, but collected text is kept in memory alone: an engine that is started "
                "again would not have these weights; set isq_cache to true"
            )
        self.live_text.stop()
        wanted = Wanted("calibrate", config, live_tokens=self.live_text.token_ids())
        return self._requantizer.begin(wanted, self.live_text.clear)


def changed_settings(config: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    """``config`` with other settings of quantization; an empty one means its default. Raises ``BadRequest``."""
    known = isq_settings(config)
    if not settings:
        raise BadRequest(f"settings: none are given; give some of {', '.join(known)}")
    texts = {}
    for name, value in settings.items():
        if name not in known:
            raise BadRequest(f"settings: {name!r} is not about quantization; allowed: {', '.join(known)}")
        if not isinstance(value, (str, int, float)):
            raise BadRequest(f"{name}: {value!r} is not allowed; give a string, a number, true or false")
        texts[name] = str(value)
    return EngineConfig.from_parameters({**config.to_parameters(), **texts})
