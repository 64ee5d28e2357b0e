"""CLIP text encoders, with sizes read from tensor shapes.

Two layouts: Hugging Face's and OpenCLIP's, whose blocks hold query, key and value in one matrix.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config

_PUBLISHED = "text_model."
_PROJECTION = "text_projection.weight"
_HEAD_SIZE = 64


def clip_text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes of a text tower from the shapes of its Hugging Face names with the `text_model.` prefix.

    The head size is 64 in every published tower and cannot be seen in shapes.
    """
    vocab_size, hidden = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": highest_index(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, hidden // _HEAD_SIZE),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
    }


_OPEN_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
_OPEN_CLIP_TOP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_JOINED = re.compile(r"attn\.in_proj_(weight|bias)$")


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the tower lies in a file: all of a tensor, one third of its rows, or its transposed."""

    name: str
    part: int | None = None
    transposed: bool = False

    def shape(self, file: TensorFile) -> tuple[int, ...]:
        """Of the tensor, without reading it."""
        shape = file.shapes[self.name]
        if self.transposed:
            return tuple(reversed(shape))
        return shape if self.part is None else (shape[0] // 3, *shape[1:])

    def read(self, file: TensorFile) -> Tensor:
        """The tensor."""
        tensor = file.tensor(self.name)
        if self.transposed:
            return tensor.T.contiguous()
        return tensor if self.part is None else tensor.chunk(3, dim=0)[self.part]


def open_clip_names(names: Iterable[str], prefix: str, *, num_layers: int | None = None) -> dict[str, Stored]:
    """Hugging Face name with the `text_model.` prefix -> place in a file of OpenCLIP's layout.

    Args:
        names: of the file.
        prefix: before the tower's names.
        num_layers: blocks to take; all when None.
    """
    found: dict[str, Stored] = {}
    for name in names:
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if rest in _OPEN_CLIP_TOP:
            found[_PUBLISHED + _OPEN_CLIP_TOP[rest]] = Stored(name)
        block = re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", rest)
        if block is None or (num_layers is not None and int(block[1]) >= num_layers):
            continue
        start, inner = f"{_PUBLISHED}encoder.layers.{block[1]}.", block[2]
        if joined := _JOINED.match(inner):
            for part, letter in enumerate("qkv"):
                found[f"{start}self_attn.{letter}_proj.{joined[1]}"] = Stored(name, part)
        for theirs, ours in _OPEN_CLIP_BLOCK.items():
            if inner.startswith(theirs):
                found[start + ours + inner.removeprefix(theirs)] = Stored(name)
    return found


def load_open_clip_text(file: TensorFile, prefix: str, *, num_layers: int, need: Need, part: str) -> nn.Module:
    """The first `num_layers` blocks of an OpenCLIP text tower as transformers' CLIPTextModel."""
    stored = open_clip_names(file.names, prefix, num_layers=num_layers)
    return _load_tower(file, stored, "gelu", need, part=part)


def load_projected_open_clip_text(file: TensorFile, prefix: str, *, need: Need, part: str) -> nn.Module:
    """An OpenCLIP text tower with its projection, as transformers' CLIPTextModelWithProjection.

    OpenCLIP multiplies states by its `text_projection` from the right, so it holds the transposed of the linear layer's
    weight; files that call the tensor `text_projection.weight` hold the layer's own.

    Raises:
        CheckpointError: there is no such tower below `prefix`, or it has no projection.
    """
    stored = open_clip_names(file.names, prefix)
    if f"{prefix}text_projection" in file:
        stored[_PROJECTION] = Stored(f"{prefix}text_projection", transposed=True)
    elif f"{prefix}{_PROJECTION}" in file:
        stored[_PROJECTION] = Stored(f"{prefix}{_PROJECTION}")
    else:
        raise CheckpointError(str(file.path), message=f"{part}: no tensor {prefix}text_projection; name a whole file")
    return _load_tower(file, stored, "gelu", need, part=part)


def load_clip_text(file: TensorFile, prefix: str, *, need: Need, part: str = "CLIP text encoder") -> nn.Module:
    """A ViT-L text tower (transformers' CLIPTextModel) from the tensors below `prefix`.

    `prefix` ends before `text_model.`; files whose text tower lacks that level are accepted. A text projection in the
    file is not used by this tower and left out.
    """
    places = _hugging_face_names(file, prefix, part)
    places.pop(_PROJECTION, None)
    return _load_tower(file, places, "quick_gelu", need, part=part)


def load_projected_clip_text(
    file: TensorFile, prefix: str, *, need: Need, part: str, activation: str = "quick_gelu"
) -> nn.Module:
    """A text tower with its projection (transformers' CLIPTextModelWithProjection), in Hugging Face's layout.

    Where the file has no projection, the pooled state stays as it is.

    Args:
        file: holds the tower.
        prefix: as of `load_clip_text`.
        need: number format and place.
        part: what the tower is, for messages.
        activation: `quick_gelu` of OpenAI's towers, `gelu` of OpenCLIP's.
    """
    places = _hugging_face_names(file, prefix, part)
    return _load_tower(file, places, activation, need, part=part, projected=True)


def _hugging_face_names(file: TensorFile, prefix: str, part: str) -> dict[str, Stored]:
    stored = {_with_text_model(name.removeprefix(prefix)): name for name in file.names if name.startswith(prefix)}
    skipped = (f"{_PUBLISHED}embeddings.position_ids", "logit_scale")
    if f"{_PUBLISHED}embeddings.token_embedding.weight" not in stored:
        raise CheckpointError(
            str(file.path), message=f"holds no {part} (no token embedding below {prefix!r}); name another file"
        )
    return {name: Stored(original) for name, original in stored.items() if name not in skipped}


def _load_tower(
    file: TensorFile,
    stored: Mapping[str, Stored],
    activation: str,
    need: Need,
    *,
    part: str,
    projected: bool = False,
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shapes = KnownShapes({name: place.shape(file) for name, place in stored.items()}, file.path)
    inferred = {**clip_text_config(shapes), "hidden_act": activation}
    projected = projected or _PROJECTION in stored
    if projected:
        inferred["projection_dim"] = shapes[_PROJECTION][0] if _PROJECTION in stored else inferred["hidden_size"]
    fixed = [key for key in inferred if key not in ("num_attention_heads", "hidden_act")]
    config = CLIPTextConfig(**merge_config(inferred, file, fixed=fixed), bos_token_id=None, eos_token_id=2)
    # transformers 5 dropped the `text_model.` level inside CLIPTextModel, but not where a projection follows it
    level = "" if projected else _PUBLISHED
    tensors = {name.removeprefix(level): (lambda place=place: place.read(file)) for name, place in stored.items()}
    if projected:
        tensors.setdefault(_PROJECTION, lambda: torch.eye(config.hidden_size))
    return load_module(
        lambda: CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config),
        tensors,
        path=file.path,
        part=part,
        dtype=need.dtype,
        device=need.device,
        prepare=need.prepare_text_encoder,
    )


def _with_text_model(name: str) -> str:
    level = ("embeddings.", "encoder.", "final_layer_norm.")
    return _PUBLISHED + name if name.startswith(level) else name
