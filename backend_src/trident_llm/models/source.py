"""ModelSource: where a model's files lie on this machine, found from what the user wrote as ``model``.

Looks at file names only; config_reader reads the configuration, weights the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import BadRequest, LoadFailed, NotFound

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Those that a model may have, its chat template's among them."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Files of one model."""

    name: str
    """What the user asked for."""
    folder: Path
    """Holds config.json and tokenizer files (safetensors), or the GGUF file."""
    weight_files: tuple[Path, ...]
    """Safetensors shards by name, or one GGUF file. Empty only when resolved without weights."""
    format: Literal["safetensors", "gguf"]
    revision: str = ""
    """Commit of a Hugging Face model; empty for local files."""


def resolve_model(
    model: str, revision: str = "", *, weights: bool = True, progress: Callable[[str], None] | None = None
) -> ModelSource:
    """Find the files of ``model``: a local folder, a local .gguf file, or a Hugging Face id (downloaded if needed).

    ``weights=False`` asks for the configuration and tokenizer only, for random weights. ``progress`` gets lines of
    text while something is downloaded. Raises ``BadRequest`` (malformed or ambiguous), ``NotFound`` (no such file,
    model or revision) or ``LoadFailed`` (no access, no connection, unusable files).
    """
    if not model.strip():
        raise BadRequest("model: empty; give a Hugging Face id, a local folder, or a .gguf file")
    path, exists = _as_path(model)
    if exists or _looks_local(model):
        if revision:
            raise BadRequest(f"revision: {revision!r} given, but model {model!r} is a local path, which has none")
        if not exists:
            raise NotFound(f"model: {model!r}: no such file or folder ({path.absolute()})")
        return _from_folder(model, path, weights) if path.is_dir() else _from_file(model, path)

    from .hub import download_model

    folder = download_model(model, revision, weights=weights, progress=progress)
    return _from_folder(model, folder, weights, revision=folder.name)


def _as_path(model: str) -> tuple[Path, bool]:
    """``model`` as a path, and whether something is there."""
    try:
        path = Path(model).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"model: {model!r} is neither a Hugging Face id nor a path: {error}") from error


def _looks_local(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith(".gguf") or model.count("/") > 1


def _from_file(name: str, path: Path) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(name=name, folder=path.parent, weight_files=(path,), format="gguf")
    if path.suffix in PICKLED:
        raise pickled_weights(name, [path.name])
    raise BadRequest(f"model: {name!r} is a file, but no .gguf file; give the folder that holds config.json")


def _from_folder(name: str, folder: Path, weights: bool, revision: str = "") -> ModelSource:
    has_config = (folder / "config.json").is_file()
    shards = find_safetensors(folder) if weights else ()
    if shards and not has_config:
        raise NotFound(f"model: {name!r}: no config.json beside the weights in {folder}")
    if shards or (has_config and not weights):
        return ModelSource(name=name, folder=folder, weight_files=shards, format="safetensors", revision=revision)
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) > 1:
        names = ", ".join(path.name for path in gguf)
        raise BadRequest(f"model: {name!r} holds several GGUF files; give the path of one of them: {names}")
    if gguf:
        return ModelSource(name=name, folder=folder, weight_files=tuple(gguf), format="gguf", revision=revision)
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    if pickled and weights:
        raise pickled_weights(name, [path.name for path in pickled])
    wanted = "*.safetensors or *.gguf weights" if weights else "config.json"
    raise NotFound(f"model: {name!r}: no {wanted} in {folder}")


def find_safetensors(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder that hold the model: those of its index, or the only one."""
    if (folder / INDEX_FILE).is_file():
        shards = tuple(folder / name for name in read_index(folder / INDEX_FILE))
        for shard in shards:
            if not shard.is_file():
                raise NotFound(f"{folder / INDEX_FILE} names {shard.name}, which is missing")
        return shards
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LoadFailed(f"{folder} holds several safetensors files and no {INDEX_FILE} to say what is where: {names}")
    return tuple(found)


def read_index(path: Path) -> list[str]:
    """Names of the shards in a safetensors index, each once, in order of name."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadFailed(f"{path}: not an index of safetensors files: {error!r}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadFailed(f"{path}: {name!r} is not the name of a safetensors file in the same folder")
    return names


def pickled_weights(name: str, files: list[str]) -> BadRequest:
    """The refusal of a model that comes as pickled files."""
    return BadRequest(
        f"model: {name!r} has its weights pickled ({', '.join(files)}); loading such files can run any code they "
        "contain, so only safetensors and GGUF are read. Convert it, for example with transformers' save_pretrained"
    )
