"""The classes that the model repository's model.py files hand to the Triton server: doors to one engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from ..config import EngineConfig
from ..errors import BadRequest, TridentError
from ..logs import configure_logging
from ..options import LLM_DEFAULTS, VLLM_DEFAULTS
from ..process_memory import freeze_loaded_objects
from ..run_directory import Launch, RunDirectory
from .admin import AdminDoor
from .engine_client import EngineClient
from .iterative import IterativeDoor
from .metrics import MetricsPublisher
from .model_config import (
    ENGINE_PARAMETER,
    check_capacity,
    complete_admin_config,
    complete_generation_config,
    engine_launch,
    is_iterative,
    parameters_of,
)
from .model_loads import ModelLoad, num_instances
from .request import RequestReader
from .server_index import ServerIndex, arguments_of, index_address
from .streaming import StreamingDoor
from .tracing import check_tracing
from .unload_watch import UnloadWatch


class _Door:
    """What all doors share: the connection to the engine, metrics, and an orderly end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Connect to the engine, or start it, and wait until it is ready. Its error becomes the model's."""
        configure_logging(args["model_instance_name"])
        model_config = json.loads(args["model_config"])
        parameters = parameters_of(model_config)
        engine_name = _engine_name(model_config)
        try:
            # The server is the parent of every process that runs a Python model.
            owner_pid = os.getppid()
            run_directory = RunDirectory.of(owner_pid, engine_name)
            self._load = ModelLoad(run_directory, args["model_name"], args["model_version"])
            launch = None if ENGINE_PARAMETER in parameters else self.launch(model_config, parameters)
            self._client = EngineClient(
                run_directory, launch=launch, owner_pid=owner_pid, log=pb_utils.Logger.log_info
            )
            welcome = self._client.start()
            configure_logging(args["model_instance_name"], welcome.log_format, welcome.log_level)
            if welcome.otlp_endpoint:
                from .tracer import Tracer

                self._client.events.tracer = Tracer(welcome.otlp_endpoint, welcome.model)
            self._door = self.open_door(model_config, run_directory)
        except TridentError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._metrics = MetricsPublisher(self._client, engine_name)
        index = ServerIndex(index_address(arguments_of(owner_pid)))
        self._unload_watch = UnloadWatch(
            self._client,
            self._load,
            ask_state=lambda: index.state_of(args["model_name"], args["model_version"]),
            num_running=lambda: self._door.num_running,
            release=self._release,
        )
        self._load.show(num_instances(model_config))
        freeze_loaded_objects()

    def launch(self, model_config: dict[str, Any], parameters: dict[str, str]) -> Launch:
        """How to start the engine that this model owns. Raises ``BadRequest`` naming a wrong setting."""
        engine = EngineConfig.from_parameters(parameters)
        check_capacity(model_config, engine)
        check_tracing(engine.otlp_endpoint)
        return engine_launch(parameters)

    def open_door(self, model_config: dict[str, Any], run_directory: RunDirectory) -> Any:
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any] | None:
        return self._door.execute(requests)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on."""
        return self._client.ready

    def finalize(self) -> None:
        self._unload_watch.close()
        self._release(self._unload_watch.drained_for)

    def _release(self, drained_for: float) -> None:
        """Give up all that this door has of the engine; again does nothing. ``drained_for``: seconds of
        ``drain_timeout`` that have passed."""
        self._door.close()
        # The next publisher must find none of this one's values, and it begins when the client closes.
        self._metrics.close()
        self._client.close(drained_for)
        self._load.leave()


def _engine_name(model_config: dict[str, Any]) -> str:
    """Of the engine that a model owns, or is a door to."""
    return parameters_of(model_config).get(ENGINE_PARAMETER) or str(model_config["name"])


def _begin_load(model_config: dict[str, Any]) -> None:
    """To be called once a load, before there are doors: the server completes the config by a process of its own."""
    arguments = arguments_of(os.getpid())
    version = Path(arguments[0]).parent.name if arguments else ""
    if version.isdigit():
        try:
            run_directory = RunDirectory.of(os.getppid(), _engine_name(model_config))
            ModelLoad.begin(run_directory, model_config["name"], version)
        except TridentError as error:
            raise pb_utils.TritonModelException(str(error)) from None


class TridentPythonModel(_Door):
    """A generation door; the presence of ``sequence_batching`` decides how it delivers."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        _begin_load(auto_complete_model_config.as_dict())
        return complete_generation_config(auto_complete_model_config)

    def open_door(self, model_config: dict[str, Any], run_directory: RunDirectory) -> IterativeDoor | StreamingDoor:
        iterative = is_iterative(model_config)
        assert self._client.welcome is not None
        reader = RequestReader(self._client.welcome, LLM_DEFAULTS if iterative else VLLM_DEFAULTS)
        return IterativeDoor(self._client, reader) if iterative else StreamingDoor(self._client, reader)


class TridentAdminModel(_Door):
    """The admin door."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        _begin_load(auto_complete_model_config.as_dict())
        return complete_admin_config(auto_complete_model_config)

    def launch(self, model_config: dict[str, Any], parameters: dict[str, str]) -> Launch:
        raise BadRequest(f"{ENGINE_PARAMETER}: missing; give the name of the model that owns the engine")

    def open_door(self, model_config: dict[str, Any], run_directory: RunDirectory) -> AdminDoor:
        return AdminDoor(self._client, run_directory)
