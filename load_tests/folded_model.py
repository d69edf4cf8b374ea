"""A copy of a model whose norm weights are folded into the linear layers: the same function from other weights.

The weights of a quantized GGUF file lie on a grid, on which rounding to as many bits costs next to nothing. Multiplied
by the norms' weights they lie off it, as those of a full-precision checkpoint do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from quality_texts import KINDS, text_sequences
from safetensors.torch import save_file
from teacher_forced import TeacherForced
from torch import Tensor

from trident_llm import EngineConfig
from trident_llm.engine.loading import load_model
from trident_llm.models.config_reader import read_model_config
from trident_llm.models.model_config import ModelConfig
from trident_llm.models.source import SINGLE_FILE, resolve_model
from trident_llm.models.tokenizer_files import prepare_tokenizer
from trident_llm.models.weights import WeightReader, open_weights
from trident_llm.text import Tokenizer

_MOST_DIFFERENCE = 1e-4
"""Between logits of the model and its copy, as a share of the largest."""
_READ_BY_INPUT_NORM = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_READ_BY_POST_ATTENTION_NORM = ("mlp.gate_proj", "mlp.up_proj")


def unfolded_or_folded(model: str, work: Path) -> str:
    """``model`` itself, or the folder of its folded copy if it is a GGUF file; made once in ``work``.

    Raises ValueError when the copy computes something else.
    """
    source = resolve_model(model)
    if source.format != "gguf":
        return model
    file = source.weight_files[0]
    state = file.stat()
    identity = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    folder = work / identity[:16]
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as made:
            write_folded_model(model, Path(made) / "model")
            check_same_function(model, str(Path(made) / "model"))
            (Path(made) / "model").rename(folder)
    return str(folder)


def check_same_function(model: str, folded: str) -> None:
    """Raises ValueError unless both have equal logits in float32, but for rounding."""
    logits = [_first_logits(name) for name in (model, folded)]
    difference = (logits[0] - logits[1]).abs().max().item()
    if difference > _MOST_DIFFERENCE * logits[0].abs().max().item():
        raise ValueError(f"{folded}: its logits are up to {difference:.2g} from those of {model}")


def _first_logits(model: str) -> Tensor:
    """Of a few tokens of text."""
    settings = {"model": model, "device": "cpu", "dtype": "fp32", "max_model_len": "128", "max_num_seqs": "1"}
    loaded = load_model(EngineConfig.from_parameters(settings), lambda line: None)
    tokens = text_sequences(Tokenizer(loaded.tokenizer_folder), KINDS[0], 128, 1)[0]
    return next(TeacherForced(loaded, "auto", 128, 128).chunks(tokens)).logits


def write_folded_model(model: str, folder: Path) -> None:
    """Write ``model`` in float32 with all norms before linear layers 1, and a head of its own if it was tied."""
    source = resolve_model(model)
    config = read_model_config(source)
    reader = open_weights(source, config, dtype=torch.float32, device="cpu")
    shutil.copytree(prepare_tokenizer(source), folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config_fields(config), indent=1))
    save_file(dict(folded_weights(reader, config)), folder / SINGLE_FILE)


def folded_weights(reader: WeightReader, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    norm_of = _norms_by_weight(config)
    for name in reader.shapes:
        tensor = reader.read(name)
        if name in norm_of:
            tensor = tensor * reader.read(norm_of[name])
        elif name in norm_of.values():
            tensor = torch.ones_like(tensor)
        yield name, tensor.clone()
    if config.tie_word_embeddings:
        yield "lm_head.weight", reader.read("model.embed_tokens.weight") * reader.read("model.norm.weight")


def _norms_by_weight(config: ModelConfig) -> dict[str, str]:
    """The name of each weight that reads a norm's output, and of that norm."""
    found = {"lm_head.weight": "model.norm.weight"}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for norm, readers in (
            ("input_layernorm", _READ_BY_INPUT_NORM),
            ("post_attention_layernorm", _READ_BY_POST_ATTENTION_NORM),
        ):
            found |= {f"{prefix}{name}.weight": f"{prefix}{norm}.weight" for name in readers}
    return found


def _config_fields(config: ModelConfig) -> Mapping[str, Any]:
    """config.json of the folded model."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings",
        "mlp_bias", "sliding_window", "bos_token_id",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in same},
        "architectures": [config.architecture],
        "attention_bias": config.attention_output_bias,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": 0,
        "eos_token_id": list(config.eos_token_ids),
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
