"""Qwen3 text encoders from a single file or a folder, with sizes read from tensor shapes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config, readers
from library.modules.shards import TensorShards, open_sharded

_PREFIX = "model."
MARK = "layers.0.self_attn.q_norm.weight"
# what shapes cannot tell, as published
_PUBLISHED = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}


def open_qwen3(flag: str, path: str) -> TensorFile:
    """The file, or the files of a folder.

    Raises:
        CheckpointError: nothing there, or another model.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if not files:
            raise CheckpointError(flag, path, "holds no .safetensors file; name the folder of a Qwen3 text encoder")
        file: TensorFile = TensorShards(files)
    else:
        file = open_sharded(flag, path)
    if not any(name.removeprefix(_PREFIX) == MARK for name in file.names):
        raise CheckpointError(flag, path, f"holds no Qwen3 text encoder (no tensor {MARK}); name another file")
    return file


def _names(file: TensorFile) -> dict[str, str]:
    """transformers' name -> name in the file; the output layer is not part of the encoder."""
    return {name.removeprefix(_PREFIX): name for name in file.names if not name.startswith("lm_head.")}


def qwen3_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes from the shapes of transformers' names."""
    vocab_size, hidden = shapes["embed_tokens.weight"]
    head_size = shapes[MARK][0]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": highest_index(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_size,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_size,
        "head_dim": head_size,
    }


def _folder_config(path: str, inferred: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes cannot tell, from the `config.json` of a folder.

    Raises:
        CheckpointError: it is unreadable or contradicts the shapes.
    """
    place = Path(path) / "config.json"
    if not place.is_file():
        return {}
    try:
        given = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(place), message="is not JSON; download it again") from error
    for key, value in inferred.items():
        if given.get(key, value) != value:
            message = f"says {key} = {given[key]!r}, but tensor shapes say {value!r}; the files do not belong together"
            raise CheckpointError(str(place), message=message)
    theta = given.get("rope_theta") or (given.get("rope_parameters") or {}).get("rope_theta")
    found = {key: given[key] for key in ("rms_norm_eps", "max_position_embeddings") if key in given}
    return found | ({"rope_theta": theta} if theta else {})


def load_qwen3(file: TensorFile, path: str, *, need: Need) -> nn.Module:
    """transformers' Qwen3Model, without its output layer.

    Args:
        file: from `open_qwen3`.
        path: the file or folder that was named.
        need: number format and place.

    Raises:
        CheckpointError: tensors are missing or contradict the configuration.
    """
    from transformers import Qwen3Config, Qwen3Model

    names = _names(file)
    inferred = qwen3_config(KnownShapes({ours: file.shapes[stored] for ours, stored in names.items()}, file.path))
    published = {**_PUBLISHED, **_folder_config(path, inferred)}
    sizes = merge_config({**inferred, **published}, file, fixed=inferred)
    theta = sizes.pop("rope_theta")
    config = Qwen3Config(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        use_cache=False,
    )
    return load_module(
        lambda: Qwen3Model(config),
        readers(file, names),
        path=file.path,
        part="Qwen3 text encoder",
        dtype=need.dtype,
        device=need.device,
        prepare=need.prepare_text_encoder,
    )
