"""The language model of Qwen2.5-VL as a text encoder, with sizes read from tensor shapes."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config, readers

MARK = "layers.0.self_attn.q_proj.bias"
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEAD_SIZE = 128  # of every published model; cannot be seen in shapes


def qwen25_vl_names(file: TensorFile) -> dict[str, str]:
    """transformers' name -> name in the file, without the parts that see images or predict words; empty for others."""
    for prefix in _PREFIXES:
        if prefix + MARK in file:
            own = re.compile(re.escape(prefix) + r"((?:embed_tokens|layers|norm)\..+)")
            return {match[1]: name for name in file.names if (match := own.fullmatch(name))}
    return {}


def qwen25_vl_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes from the shapes of transformers' names; heads of 128 channels and what they turn by, as published."""
    vocab_size, hidden = shapes["embed_tokens.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": highest_index(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": max(1, shapes["layers.0.self_attn.q_proj.weight"][0] // _HEAD_SIZE),
        "num_key_value_heads": max(1, shapes["layers.0.self_attn.k_proj.weight"][0] // _HEAD_SIZE),
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
        "max_position_embeddings": 128_000,
    }


def load_qwen25_vl_text(file: TensorFile, *, need: Need) -> nn.Module:
    """transformers' Qwen2_5_VLTextModel.

    Raises:
        CheckpointError: no such model in the file, or tensors are missing.
    """
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    names = qwen25_vl_names(file)
    if not names:
        message = f"holds no Qwen2.5-VL language model (no tensor model.{MARK}); name another file"
        raise CheckpointError(str(file.path), message=message)
    shapes = KnownShapes({ours: file.shapes[stored] for ours, stored in names.items()}, file.path)
    fixed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = merge_config(qwen25_vl_config(shapes), file, fixed=fixed)
    turning = {**sizes.pop("rope_scaling"), "rope_theta": sizes.pop("rope_theta")}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen2_5_VLTextConfig(**sizes, **special, rope_parameters=turning, use_cache=False)
    return load_module(
        lambda: Qwen2_5_VLTextModel(config),
        readers(file, names),
        path=file.path,
        part="Qwen2.5-VL text encoder",
        dtype=need.dtype,
        device=need.device,
        prepare=need.prepare_text_encoder,
    )
