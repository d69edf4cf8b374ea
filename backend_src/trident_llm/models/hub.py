"""Downloads a model from a Hugging Face hub into huggingface_hub's own cache, the needed files only.

Honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE as huggingface_hub does; interrupted downloads resume.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm

from ..errors import BadRequest, LoadFailed, NotFound, TridentError
from .source import INDEX_FILE, PICKLED, SINGLE_FILE, TOKENIZER_FILES, pickled_weights, read_index

_SMALL_FILES = ("config.json", "generation_config.json", INDEX_FILE, *TOKENIZER_FILES)
_SECONDS_BETWEEN_REPORTS = 2.0


def download_model(repo_id: str, revision: str, *, weights: bool, progress: Callable[[str], None] | None) -> Path:
    """The snapshot folder (named by its commit) of a model, with its weights unless ``weights`` is false.

    Raises ``BadRequest`` for a malformed id or a choice of several GGUF files, ``NotFound`` for an unknown model or
    revision, or one not cached while offline, and ``LoadFailed`` without access or connection.
    """
    report = progress or _no_report
    try:
        report(f"looking up {repo_id} (revision {revision or constants.DEFAULT_REVISION})")
        folder = _snapshot(repo_id, revision, _SMALL_FILES, report)
        if weights or not (folder / "config.json").is_file():
            names = _weight_names(repo_id, folder)
            if names:
                report(f"fetching {len(names)} weight file(s) of {repo_id} ({', '.join(names)})")
                _snapshot(repo_id, folder.name, names, report)
        return folder
    except TridentError:
        raise
    except Exception as error:
        # The HTTP library beneath huggingface_hub, and so the type of a lost connection, differs between its versions.
        raise _explain(error, repo_id, revision) from error


def _snapshot(repo_id: str, revision: str, names: tuple[str, ...], report: Callable[[str], None]) -> Path:
    folder = snapshot_download(
        repo_id,
        revision=revision or None,
        allow_patterns=[glob.escape(name) for name in names],
        tqdm_class=_reporting_bar(report),
    )
    return Path(folder)


def _weight_names(repo_id: str, folder: Path) -> tuple[str, ...]:
    """Names of the weight files to fetch: those of the index, else what the repository has.

    Empty when the snapshot has weights already, or nobody can be asked.
    """
    if (folder / INDEX_FILE).is_file():
        return tuple(read_index(folder / INDEX_FILE))
    cached = any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    if cached or constants.HF_HUB_OFFLINE:
        return ()
    names = [name for name in HfApi().list_repo_files(repo_id, revision=folder.name) if "/" not in name]
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    for suffix in (".safetensors", ".gguf"):
        found = tuple(name for name in names if name.endswith(suffix))
        if len(found) > 1:
            raise BadRequest(
                f"model: {repo_id!r} holds several {suffix} files, and nothing says which make up the model; download "
                f"what you want and give its path: {', '.join(found)}"
            )
        if found:
            return found
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise pickled_weights(repo_id, pickled)
    return ()


def _explain(error: Exception, repo_id: str, revision: str) -> TridentError:
    """The user's version of what went wrong at the hub."""
    what = f"model: {repo_id!r} (revision {revision or constants.DEFAULT_REVISION})"
    if isinstance(error, HFValidationError):
        return BadRequest(f"model: {repo_id!r} is neither a local path nor a Hugging Face id (name or owner/name)")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) and constants.HF_HUB_OFFLINE:
        return NotFound(f"{what} is not in the cache {constants.HF_HUB_CACHE}, and offline mode is on (HF_HUB_OFFLINE)")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{what}: {constants.ENDPOINT} has the model, but no such revision")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return LoadFailed(
            f"{what}: {constants.ENDPOINT} denies access (HTTP {status}). If the id is right, the model is private or "
            "gated: set HF_TOKEN to a token of an account that may read it"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return NotFound(f"{what}: neither a local folder nor a model on {constants.ENDPOINT}")
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return LoadFailed(f"{what}: download from {constants.ENDPOINT} failed: {reason}")


def _no_report(_: str) -> None:
    return None


def _reporting_bar(report: Callable[[str], None]) -> type[hub_tqdm]:
    """huggingface_hub's progress bar (drawn on a terminal only), which also reports bytes as text now and then."""

    reported_at = time.monotonic()

    class ReportingBar(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            self._done = 0.0
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal reported_at
            self._done += n or 0
            due = time.monotonic() - reported_at >= _SECONDS_BETWEEN_REPORTS
            if self._counts_bytes and due and self.total:
                reported_at = time.monotonic()
                report(f"downloaded {self._done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB")
            return super().update(n)

    return ReportingBar
