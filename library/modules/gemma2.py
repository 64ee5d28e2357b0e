"""Gemma-2 text encoders, with sizes read from tensor shapes."""

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config, readers

GEMMA2_MARK = "layers.0.pre_feedforward_layernorm.weight"
_EMBEDDING = "embed_tokens.weight"
# where files keep the encoder: alone, as part of a language model, in a file with all parts of an image model
_PREFIXES = ("", "model.", "text_encoders.gemma2_2b.transformer.model.")
_OWN = ("embed_tokens.", "layers.", "norm.")
_EMBEDDED = "spiece_model"
_HEAD_SIZE = 256  # of every published Gemma-2 up to 9B; cannot be seen in shapes


def gemma2_names(names: Iterable[str]) -> dict[str, str]:
    """Own name -> name in the file; empty where a file holds no Gemma-2."""
    names = list(names)
    prefix = next((prefix for prefix in _PREFIXES if prefix + GEMMA2_MARK in names), None)
    if prefix is None:
        return {}
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {ours: stored for ours, stored in found.items() if ours.startswith(_OWN)}


def embedded_tokenizer(file: TensorFile) -> Path | None:
    """A folder with the SentencePiece model that some files carry as a tensor of bytes; None where there is none."""
    name = next((name for name in file.names if name.rpartition(".")[2] == _EMBEDDED), None)
    if name is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="gemma2_tokenizer_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokenizer.model").write_bytes(bytes(file.tensor(name).to(torch.uint8).tolist()))
    return folder


def gemma2_config(shapes: Mapping[str, tuple[int, ...]], head_size: int = _HEAD_SIZE) -> dict[str, Any]:
    """Sizes of a Gemma-2 model from the shapes of its own names."""
    vocab_size, hidden = shapes[_EMBEDDING]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": highest_index(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_size,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_size,
        "head_dim": head_size,
        "query_pre_attn_scalar": head_size,
    }


def load_gemma2(file: TensorFile, *, need: Need) -> nn.Module:
    """transformers' Gemma2Model from the Gemma-2 in a file.

    Attention is computed without fused kernels: those leave out the cap of its logits (50 * tanh(x / 50)), which the
    model was trained with.

    Raises:
        CheckpointError: no Gemma-2, or tensors are missing.
    """
    from transformers import Gemma2Config, Gemma2Model

    names = gemma2_names(file.names)
    if not names:
        raise CheckpointError(
            str(file.path), message=f"holds no Gemma-2 text encoder (no tensor {GEMMA2_MARK}); name another file"
        )
    shapes = KnownShapes({ours: file.shapes[stored] for ours, stored in names.items()}, file.path)
    fixed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = Gemma2Config(
        **merge_config(gemma2_config(shapes), file, fixed=fixed), attn_implementation="eager", use_cache=False
    )
    return load_module(
        lambda: Gemma2Model(config),
        readers(file, names),
        path=file.path,
        part="Gemma-2 text encoder",
        dtype=need.dtype,
        device=need.device,
        prepare=need.prepare_text_encoder,
    )
