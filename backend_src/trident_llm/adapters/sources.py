"""Where the files of an adapter come from: a folder below ``adapter_root``, or a Hugging Face id. Reads no tensors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadRequest, LoadFailed, NotFound, TridentError


@dataclass(frozen=True)
class AdapterSources:
    """Settings ``adapter_root`` (empty: no folders while serving) and ``allow_hub_adapters``."""

    adapter_root: str
    allow_hub: bool

    def find(self, path: str, what: str) -> Path:
        """The real folder of what a command names: relative to the root, or absolute below it, else a hub's id.

        Raises ``BadRequest`` for what lies elsewhere, also by way of links; ``NotFound`` where nothing is.
        """
        if not path.strip() or "\0" in path:
            raise BadRequest(f"{what}: path {path[:200]!r} is not allowed; give a folder")
        if self.adapter_root:
            root = Path(self.adapter_root).expanduser().resolve()
            folder = (root / Path(path).expanduser()).resolve()
            if not folder.is_relative_to(root):
                raise BadRequest(f"{what}: {path[:200]!r} lies outside adapter_root")
            if folder.is_dir():
                return _checked_files(folder, root, what)
        if self.allow_hub and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return download_adapter(path, what)
        if not self.adapter_root:
            raise BadRequest(f"{what}: folders cannot be loaded while serving; set adapter_root to a folder that may")
        raise NotFound(f"{what}: {path[:200]!r} is no folder below adapter_root")

    def find_trusted(self, path: str, what: str) -> Path:
        """The real folder of what the settings name: any folder, else a hub's id."""
        folder = Path(path).expanduser().resolve()
        if folder.is_dir():
            return folder
        if self.allow_hub and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return download_adapter(path, what)
        raise NotFound(f"{what}: no folder {str(folder)!r}")


def _checked_files(folder: Path, root: Path, what: str) -> Path:
    """``folder``, if none of its files is a link to somewhere outside the root."""
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise BadRequest(f"{what}: {path.relative_to(folder)} is a link to outside adapter_root")
    return folder


def download_adapter(repo_id: str, what: str) -> Path:
    """The snapshot folder of an adapter on the Hugging Face hub, without pickled files."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"])).resolve()
    except Exception as error:
        raise _hub_error(error, repo_id, what) from None


def _hub_error(error: Exception, repo_id: str, what: str) -> TridentError:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, HFValidationError):
        return BadRequest(f"{what}: {repo_id!r} is neither a folder nor a Hugging Face id")
    if isinstance(error, (RepositoryNotFoundError, LocalEntryNotFoundError)):
        return NotFound(f"{what}: {repo_id!r} is neither a folder nor on the hub ({reason})")
    return LoadFailed(f"{what}: download of {repo_id!r} failed: {reason}")


def copy_files(source: Path, destination: Path, names: tuple[str, ...], what: str) -> None:
    """Copy the files that exist: what is checked afterwards is what stays, whatever happens to the source."""
    try:
        for name in names:
            if (source / name).is_file():
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, destination / name)
    except OSError as error:
        # The error's own text names folders of the server.
        raise LoadFailed(f"{what}: its files cannot be copied: {error.strerror}") from None
