"""What the doors read from, and add to, their models' config.pbtxt: tensors, the engine's settings, capacity."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from ..config import EngineConfig
from ..errors import BadRequest
from ..run_directory import Launch

ENGINE_PARAMETER = "engine"
ADMIN_TOKEN_VARIABLE = "TRIDENT_ADMIN_TOKEN"
"""Environment variable with the setting admin_token: what stands in config.pbtxt the server tells anyone who asks."""
_BACKEND_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
"""Parameters of the server's Python backend itself."""

_STRING, _BOOL = "TYPE_STRING", "TYPE_BOOL"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model, without its batch dimension."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False

    def as_input(self) -> dict[str, Any]:
        return {**self.as_output(), "optional": self.optional}

    def as_output(self) -> dict[str, Any]:
        return {"name": self.name, "data_type": self.data_type, "dims": list(self.dims)}


PROMPT = TensorSpec("text_input", _STRING)
OPTION_INPUTS = (
    TensorSpec("image", _STRING, (-1,), optional=True),
    TensorSpec("stream", _BOOL, optional=True),
    TensorSpec("sampling_parameters", _STRING, optional=True),
    TensorSpec("exclude_input_in_output", _BOOL, optional=True),
    TensorSpec("return_finish_reason", _BOOL, optional=True),
    TensorSpec("return_cumulative_logprob", _BOOL, optional=True),
    TensorSpec("return_logprobs", _BOOL, optional=True),
    TensorSpec("return_num_input_tokens", _BOOL, optional=True),
    TensorSpec("return_num_output_tokens", _BOOL, optional=True),
    TensorSpec("embedding_request", _STRING, optional=True),
)
"""Those of NVIDIA's vllm_backend."""
GENERATION_OUTPUTS = (
    TensorSpec("text_output", _STRING, (-1,)),
    TensorSpec("finish_reason", _STRING, (-1,)),
    TensorSpec("cumulative_logprob", "TYPE_FP32", (-1,)),
    TensorSpec("logprobs", _STRING, (-1,)),
    TensorSpec("num_input_tokens", "TYPE_UINT32"),
    TensorSpec("num_output_tokens", "TYPE_UINT32", (-1,)),
    TensorSpec("num_cached_tokens", "TYPE_UINT32"),
    TensorSpec("scalings", _STRING, (-1,)),
    TensorSpec("layer_scalings", _STRING, (-1,)),
)
ADMIN_INPUTS = (TensorSpec("command", _STRING), TensorSpec("arguments", _STRING, optional=True))
ADMIN_OUTPUTS = (TensorSpec("result", _STRING),)


def is_iterative(model_config: dict[str, Any]) -> bool:
    return "sequence_batching" in model_config


def complete_generation_config(config: Any) -> Any:
    """Add tensors and the decoupled policy to the auto-complete config of a generation door."""
    iterative = is_iterative(config.as_dict())
    # One input more would split the direct strategy into one group per set of inputs that requests carry.
    inputs = (PROMPT,) if iterative else (PROMPT, *OPTION_INPUTS)
    _add_tensors(config, inputs, GENERATION_OUTPUTS)
    config.set_model_transaction_policy({"decoupled": True})
    if not iterative:
        config.set_max_batch_size(0)
    return config


def complete_admin_config(config: Any) -> Any:
    _add_tensors(config, ADMIN_INPUTS, ADMIN_OUTPUTS)
    config.set_max_batch_size(0)
    return config


def parameters_of(model_config: dict[str, Any]) -> dict[str, str]:
    """The model's parameters that are meant for this project, and the environment's secret if it owns an engine."""
    given = {key: value["string_value"] for key, value in model_config.get("parameters", {}).items()}
    parameters = {key: value for key, value in given.items() if key not in _BACKEND_PARAMETERS}
    secret = os.environ.get(ADMIN_TOKEN_VARIABLE)
    if secret and ENGINE_PARAMETER not in parameters:
        parameters["admin_token"] = secret
    return parameters


def check_capacity(model_config: dict[str, Any], engine: EngineConfig) -> None:
    """Raise unless every request that the engine accepts fits into the instances of an iterative door: those
    beyond would wait inside the server, where no priority or limit of the engine sees them."""
    if not is_iterative(model_config):
        return
    count = sum(int(group["count"]) for group in model_config["instance_group"])
    capacity = count * int(model_config["max_batch_size"])
    needed = engine.max_num_seqs + engine.max_queue_size
    if capacity < needed:
        raise BadRequest(
            f"instance_group count * max_batch_size: {count} * {model_config['max_batch_size']} = {capacity} is less "
            f"than max_num_seqs + max_queue_size ({engine.max_num_seqs} + {engine.max_queue_size} = {needed})"
        )


def engine_launch(parameters: dict[str, str]) -> Launch:
    """How to start the engine process with these settings, by the Python that runs this door."""
    python = sys.executable if os.access(sys.executable or "", os.X_OK) else shutil.which("python3") or "python3"
    return Launch(parameters=parameters, command=[python, "-m", "trident_llm.engine.process"])


def _add_tensors(config: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    present = config.as_dict()
    inputs_present = {tensor["name"] for tensor in present["input"]}
    outputs_present = {tensor["name"] for tensor in present["output"]}
    for spec in inputs:
        if spec.name not in inputs_present:
            config.add_input(spec.as_input())
    for spec in outputs:
        if spec.name not in outputs_present:
            config.add_output(spec.as_output())
