"""What the launcher was asked to do: command-line options, checked as far as they can be without a server."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadRequest, NotFound
from ..server.model_config import ADMIN_TOKEN_VARIABLE

PORT_OPTIONS = ("--http-port", "--grpc-port", "--metrics-port")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One launch. ``host`` is an IPv4 address; ``only`` is empty for all models; ports may still be 0 (any free)."""

    repository: Path
    model: str
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    settings: dict[str, str]
    only: tuple[str, ...]
    doors: int | None
    sample: bool
    log: Path | None

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the server."""
        return not ipaddress.IPv4Address(self.host).is_loopback

    @property
    def connect_host(self) -> str:
        """The address under which this machine reaches the server."""
        return "127.0.0.1" if ipaddress.IPv4Address(self.host).is_unspecified else self.host


def parse_options(arguments: Sequence[str]) -> Options:
    """Options from a command line. Raises ``BadRequest`` or ``NotFound``; argparse exits with 2 on bad syntax."""
    args = _parser().parse_args(arguments)
    repository = args.model_repository.expanduser().resolve()
    names = model_names(repository)
    only = _only(args.only, names)
    settings = _with_absolute_paths(_settings(args.set))
    if "llm" in (only or names) and os.environ.get(ADMIN_TOKEN_VARIABLE):
        settings.setdefault("admin_token", os.environ[ADMIN_TOKEN_VARIABLE])
    if args.model is not None and "model" in settings:
        raise BadRequest("--model and --set model=... are the same setting; give one of them")
    model = args.model if args.model is not None else settings.pop("model", "")
    if "llm" not in (only or names) and (model or settings or args.doors):
        raise BadRequest("--model, --set and --doors belong to the model llm, which is not among the models to load")
    options = Options(
        repository=repository,
        model=_local_path(model),
        host=_ipv4(args.host),
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        settings=settings,
        only=only,
        doors=args.doors,
        sample=not args.no_sample,
        log=_log_file(args.log) if args.log else None,
    )
    if options.is_public and not settings.get("admin_token"):
        raise BadRequest(
            f"--host {args.host}: other machines could reach the server; set a secret for llm_admin with "
            f"the environment variable {ADMIN_TOKEN_VARIABLE} or --set admin_token=..., or listen on 127.0.0.1"
        )
    return options


def model_names(repository: Path) -> tuple[str, ...]:
    """The models of a repository folder, by name. Raises ``NotFound`` when it has none."""
    names = tuple(sorted(path.parent.name for path in repository.glob("*/config.pbtxt")))
    if not names:
        raise NotFound(f"--model-repository {repository}: no folder with models (NAME/config.pbtxt) in it")
    return names


def default_repository() -> Path:
    """The checkout's model_repository."""
    return Path(__file__).resolve().parents[3] / "model_repository"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Serve a language model from an NVIDIA Triton Inference Server.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="Hugging Face id, folder or .gguf file (default: a SmolLM2)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of the engine; may be repeated")
    add("--only", metavar="NAME,...", help="load these models of the repository only")
    add("--doors", metavar="N", type=_positive, help="instances of the model llm (default: as its config.pbtxt says)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    for option, port in zip(PORT_OPTIONS, (8000, 8001, 8002), strict=True):
        add(option, metavar="PORT", type=_port, default=port, help=f"default: {port}; 0 picks a free one")
    add("--no-sample", action="store_true", help="do not answer a sample prompt after the start")
    add("--log", metavar="FILE", type=Path, help="keep the server's log in this file")
    add("--model-repository", metavar="FOLDER", type=Path, default=default_repository(), help=argparse.SUPPRESS)
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number from 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise BadRequest(f"--set {pair!r}: not of the form key=value")
        if key in settings:
            raise BadRequest(f"--set {key}: given twice")
        settings[key] = value
    return settings


_FOLDERS = ("adapter_root", "xlora")


def _with_absolute_paths(settings: dict[str, str]) -> dict[str, str]:
    """Folders of adapters relative to here: the engine runs elsewhere. What is no folder may be a hub's id."""
    changed = {key: _absolute(settings[key]) for key in _FOLDERS if settings.get(key)}
    if settings.get("adapters"):
        pairs = [part.partition("=") for part in settings["adapters"].split(",")]
        changed["adapters"] = ",".join(f"{name}{equals}{_absolute(path)}" for name, equals, path in pairs)
    return {**settings, **changed}


def _absolute(text: str) -> str:
    path = Path(text.strip()).expanduser()
    return str(path.resolve()) if text.strip() and path.exists() else text.strip()


def _only(text: str | None, names: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return ()
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        raise BadRequest(f"--only {text!r}: allowed are {', '.join(names)}")
    return chosen


def _local_path(model: str) -> str:
    """``model`` as an absolute path if it names a local file or folder, else as it is."""
    if not model:
        return model
    path = Path(model).expanduser()
    if path.exists():
        return str(path.resolve())
    if model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf"):
        raise NotFound(f"--model {model}: no such file or folder")
    return model


def _log_file(path: Path) -> Path:
    path = path.expanduser().resolve()
    try:
        path.open("ab").close()
    except OSError as error:
        raise BadRequest(f"--log {path}: {str(error.strerror).lower()}") from None
    return path


def _ipv4(host: str) -> str:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]
    except OSError:
        raise BadRequest(f"--host {host!r}: not an IPv4 address, nor a name that resolves to one") from None
