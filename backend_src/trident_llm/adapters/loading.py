"""Makes the adapter store of an engine, and loads what the settings name."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..config import EngineConfig
from ..models.llama import LlamaDecoder
from .adapter_file import AdapterTarget
from .journal import AdapterJournal
from .mix import DEFAULT_NAME
from .sources import AdapterSources
from .spec import parse_adapter_list
from .store import AdapterStore


def make_store(
    config: EngineConfig, decoder: LlamaDecoder, folder: Path | None, progress: Callable[[str], None]
) -> AdapterStore | None:
    """The store for a loaded model; None where the settings leave no room for adapters.

    What an engine before this one left in ``folder`` wins over the settings. Raises ``BadRequest``, ``NotFound`` or
    ``LoadFailed`` when an adapter of the settings cannot be loaded.
    """
    if not config.serves_adapters:
        return None
    target = AdapterTarget(
        linears=tuple(decoder.adaptable_linears()),
        dtype=decoder.dtype,
        device=decoder.device,
        max_rank=config.max_lora_rank,
    )
    store = AdapterStore(
        target,
        AdapterJournal(folder or Path(tempfile.mkdtemp(prefix="trident-adapters-")), keep=folder is not None),
        num_slots=config.max_loras,
        max_in_host_memory=config.max_cpu_loras,
    )
    if store.is_new:
        sources = AdapterSources(config.adapter_root, config.allow_hub_adapters)
        for name, path in parse_adapter_list(config.adapters).items():
            progress(f"loading adapter {name}")
            store.wait(store.load(name, functools.partial(sources.find_trusted, path), path))
        if config.xlora:
            progress("loading the X-LoRA mix")
            find = functools.partial(sources.find_trusted, config.xlora)
            store.wait(store.mixes.load(DEFAULT_NAME, find, config.xlora))
    return store
