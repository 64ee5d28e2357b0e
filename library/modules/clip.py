"""CLIP text encoders, with sizes read from tensor shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.loading import highest_index, load_module, merge_config, readers

_PUBLISHED = "text_model."
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
        "hidden_act": "quick_gelu",
    }


def load_clip_text(
    file: TensorFile, prefix: str, *, dtype: torch.dtype, device: torch.device | str, part: str = "CLIP text encoder"
) -> nn.Module:
    """A ViT-L text tower (transformers' CLIPTextModel) from the tensors below `prefix`.

    `prefix` ends before `text_model.`; files whose text tower lacks that level are accepted. A text projection in the
    file is not used by this tower and left out.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    stored = {_with_text_model(name.removeprefix(prefix)): name for name in file.names if name.startswith(prefix)}
    skipped = (f"{_PUBLISHED}embeddings.position_ids", "text_projection.weight", "logit_scale")
    stored = {name: original for name, original in stored.items() if name not in skipped}
    if f"{_PUBLISHED}embeddings.token_embedding.weight" not in stored:
        raise CheckpointError(
            str(file.path), message=f"holds no {part} (no token embedding below {prefix!r}); name another file"
        )
    shapes = KnownShapes({name: file.shapes[original] for name, original in stored.items()}, file.path)
    inferred = clip_text_config(shapes)
    fixed = [key for key in inferred if key not in ("num_attention_heads", "hidden_act")]
    config = CLIPTextConfig(**merge_config(inferred, file, fixed=fixed), bos_token_id=None, eos_token_id=2)
    # transformers 5 dropped the `text_model.` level inside CLIPTextModel
    names = {name.removeprefix(_PUBLISHED): original for name, original in stored.items()}
    return load_module(
        lambda: CLIPTextModel(config), readers(file, names), path=file.path, part=part, dtype=dtype, device=device
    )


def _with_text_model(name: str) -> str:
    level = ("embeddings.", "encoder.", "final_layer_norm.")
    return _PUBLISHED + name if name.startswith(level) else name
