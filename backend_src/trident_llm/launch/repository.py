"""The private copy of the model repository that one server is started with: models, settings, door count."""

from __future__ import annotations

import shutil
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from ..config import EngineConfig
from ..errors import BadRequest
from ..server.model_config import ENGINE_PARAMETER, check_capacity, parameters_of
from .default_model import default_model
from .options import Options

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
"""The folder of the package ``trident_llm`` that this process runs."""


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """A config.pbtxt. Raises ``BadRequest`` with the place of a syntax error."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise BadRequest(f"{path}: {error}") from None


def write_config(config: model_config_pb2.ModelConfig, path: Path) -> None:
    path.write_text(text_format.MessageToString(config))


def configure_llm(config: model_config_pb2.ModelConfig, options: Options) -> EngineConfig:
    """Write the launch's settings into the config of the model ``llm``.

    Returns the settings as the engine will read them: with ``admin_token``, which is not written, because the server
    shows its models' configs. Raises ``BadRequest`` naming the setting that is wrong.
    """
    values = {"model": options.model or config.parameters["model"].string_value or default_model(), **options.settings}
    for key, value in values.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"{key}: {value!r} is not valid UTF-8") from None
        if key != "admin_token":
            config.parameters[key].string_value = value
    if options.doors is not None:
        if not config.instance_group:
            config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
        config.instance_group[0].count = options.doors
    model_config = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    secret = {"admin_token": values["admin_token"]} if "admin_token" in values else {}
    engine_config = EngineConfig.from_parameters({**parameters_of(model_config), **secret})
    if config.instance_group:
        check_capacity(model_config, engine_config)
    return engine_config


def copy_repository(options: Options, target: Path) -> EngineConfig | None:
    """Copy the repository to ``target``, with the launch's settings; the engine's settings, if it has an ``llm``.

    Each model finds the package ``trident_llm`` beside its model.py, because the Python inside the server
    reads no PYTHONPATH and the package need not be installed.
    """
    engine_config = None
    for source in sorted(options.repository.glob("*/config.pbtxt")):
        folder = target / source.parent.name
        shutil.copytree(source.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for version in folder.glob("[0-9]*"):
            if not (version / PACKAGE_FOLDER.name).exists():
                (version / PACKAGE_FOLDER.name).symlink_to(PACKAGE_FOLDER)
        config = read_config(source)
        owner = config.parameters[ENGINE_PARAMETER].string_value if ENGINE_PARAMETER in config.parameters else ""
        if owner and folder.name in options.only and owner not in options.only:
            raise BadRequest(f"--only {','.join(options.only)}: {folder.name} needs {owner}, which owns its engine")
        if folder.name == "llm":
            engine_config = configure_llm(config, options)
            write_config(config, folder / "config.pbtxt")
    return engine_config
