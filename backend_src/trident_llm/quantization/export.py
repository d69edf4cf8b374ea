"""Writes a quantized model as a compressed-tensors safetensors folder, which vLLM and transformers load too.

Format: https://github.com/vllm-project/compressed-tensors (pack-quantized, int-quantized and float-quantized).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import EngineConfig
from ..engine.loading import choose_device, choose_dtype
from ..errors import BadRequest, LoadFailed
from ..kernels.quantized_weight import QuantizedWeight
from ..models.config_reader import read_model_config
from ..models.llama import LlamaDecoder
from ..models.model_config import ModelConfig
from ..models.quantized_layouts import pack_fields
from ..models.source import INDEX_FILE, TOKENIZER_FILES, ModelSource, resolve_model
from ..models.tokenizer_files import prepare_tokenizer
from ..models.weights import WeightReader, expected_shapes, open_weights
from .cache import files_identity, open_cache
from .exported_config import Scheme, config_fields, quantization_config
from .installation import HEAD_WEIGHT, Parameter
from .loading import Quantization, QuantizationReport
from .modules import model_modules

_SHARD_BYTES = 4 << 30
_COPIED = ("generation_config.json", *TOKENIZER_FILES)


def quantize_to_folder(config: EngineConfig, folder: Path, progress: Callable[[str], None]) -> QuantizationReport:
    """Quantize the model of ``config`` by its settings ``isq_*`` and write it to ``folder``, which must not exist yet.

    Raises ``BadRequest``, ``NotFound`` or ``LoadFailed``; the folder then does not exist either.
    """
    if folder.exists():
        raise BadRequest(f"--out {folder}: it exists already; give the name of a new folder")
    device = choose_device(config.device)
    source = resolve_model(config.model, config.revision, progress=progress)
    model_config = read_model_config(source)
    dtype = choose_dtype(config.dtype, model_config.dtype, device)
    quantization = Quantization(config, model_config, device)
    if not quantization.enabled:
        raise BadRequest("isq_method: none; name the method to quantize with")
    if not config.isq_cache:
        raise BadRequest("isq_cache: false; the folder is written from the cache of quantized weights")
    tokenizer_folder = prepare_tokenizer(source, progress=progress)
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    quantization.read_calibration(tokenizer_folder, max_model_len)
    reader = open_weights(source, model_config, dtype=dtype, device=device)
    decoder = LlamaDecoder(model_config, dtype=dtype, device=device, max_model_len=max_model_len)
    identity = files_identity(source.weight_files)
    report = quantization.load(decoder, reader, identity, progress)
    cached = open_cache(quantization.cache_folder(dtype, identity), progress)
    if cached is None:
        raise LoadFailed("the quantized weights could not be kept in the cache, from which the folder is written")
    progress(f"writing {folder}")
    write_folder(folder, source, model_config, reader, cached.parameters(torch.device("cpu")), tokenizer_folder)
    return report


def write_folder(
    folder: Path,
    source: ModelSource,
    config: ModelConfig,
    reader: WeightReader,
    parameters: Iterable[tuple[str, Parameter]],
    tokenizer_folder: Path,
) -> None:
    """parameters: what is not as ``reader`` has it, by ``Installer``'s names. Whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        export = _Export(config)
        _write_shards(making, export.tensors(reader, parameters))
        for origin in (tokenizer_folder, source.folder):
            for name in _COPIED:
                if (origin / name).is_file() and not (making / name).exists():
                    shutil.copyfile(origin / name, making / name)
        fields = config_fields(source, config, dtype=export.dtype, tied=config.tie_word_embeddings and not export.head)
        fields["quantization_config"] = quantization_config(export.schemes, export.full)
        (making / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        making.chmod(0o755)
        making.rename(folder)
    except OSError as error:
        raise LoadFailed(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


class _Export:
    """Parameters under the checkpoint's names, and how each linear layer turned out once all have passed."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = expected_shapes(config)
        self._parts = {module.name: module.parts for module in model_modules(config) if module.layer is not None}
        self.schemes: dict[str, Scheme] = {}
        """Of the quantized projections."""
        self.full: list[str] = []
        """Names of the others."""
        self.head = False
        """Whether there is a quantized head."""
        self.dtype = torch.bfloat16
        """Of what is not quantized."""

    def tensors(
        self, reader: WeightReader, parameters: Iterable[tuple[str, Parameter]]
    ) -> Iterator[tuple[str, Tensor]]:
        written = set()
        for name, value in parameters:
            for part, piece in self._pieces(name, value):
                written.add(part)
                yield from self._stored(part, piece)
        for name in self._shapes:
            if name not in written:
                yield from self._stored(name, reader.read(name))

    def _pieces(self, name: str, value: Parameter) -> Iterator[tuple[str, Parameter]]:
        """The checkpoint's parameters that one of ours stands for. Scales of inputs and outputs are folded in already,
        and matter to adapters alone."""
        owner, _, kind = name.rpartition(".")
        if kind in ("input_scales", "output_scales"):
            return
        names = [f"{part}.{kind}" for part in self._parts.get(owner, (owner,))]
        if len(names) == 1:
            yield names[0], value
            return
        start = 0
        for part in names:
            rows = slice(start, start + self._shapes[part][0])
            yield part, _rows(value, rows) if isinstance(value, QuantizedWeight) else value[rows]
            start = rows.stop

    def _stored(self, name: str, value: Parameter) -> Iterator[tuple[str, Tensor]]:
        module, _, kind = name.rpartition(".")
        if isinstance(value, Tensor):
            if kind == "weight" and value.dim() == 2 and name != "model.embed_tokens.weight":
                self.full.append(module)
            self.dtype = value.dtype
            yield name, value.cpu().contiguous().clone()
            return
        self.head |= name == HEAD_WEIGHT
        self.schemes[module] = Scheme.of(value)
        for leaf, tensor in stored_tensors(value).items():
            yield f"{module}.{leaf}", tensor.cpu().contiguous()


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return QuantizedWeight(
        codes=weight.codes[rows],
        scales=weight.scales[rows],
        zero_points=weight.zero_points[rows],
        bits=weight.bits,
        group_size=weight.group_size,
        activations=weight.activations,
    )


def stored_tensors(weight: QuantizedWeight) -> Mapping[str, Tensor]:
    """What compressed-tensors keeps of a weight without an input order, by the names beside the module's."""
    middle = 2 ** (weight.bits - 1)
    if weight.activations == "fp8":
        return {"weight": weight.codes, "weight_scale": weight.scales}
    if weight.activations == "int8":
        tensors = {"weight": (weight.codes ^ middle).view(torch.int8), "weight_scale": weight.scales}
        zero_points = (weight.zero_points ^ middle).view(torch.int8)
    else:
        tensors = {
            "weight_packed": pack_fields(weight.codes, weight.bits),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        zero_points = pack_fields(weight.zero_points.t(), weight.bits).t()
    return tensors if Scheme.of(weight).symmetric else {**tensors, "weight_zero_point": zero_points}


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or several files and their index."""
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    for name, tensor in tensors:
        if shards[-1] and sizes[-1] + tensor.nbytes > _SHARD_BYTES:
            _save(folder, len(shards), shards[-1])
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    _save(folder, len(shards), shards[-1])
    if len(shards) == 1:
        _shard_path(folder, 1).rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names, 1):
        _shard_path(folder, number).rename(folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(folder: Path, number: int, shard: dict[str, Any]) -> None:
    """Write a shard; of its tensors only the names stay."""
    save_file(shard, _shard_path(folder, number), metadata={"format": "pt"})
    shard.update(dict.fromkeys(shard))


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"
