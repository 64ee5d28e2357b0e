"""T5 encoders, with sizes read from tensor shapes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config, readers

_SHARED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"
_ATTENTION = "encoder.block.0.layer.0.SelfAttention"


def t5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes of a T5 v1.1 encoder (gated GELU, no tied output) from the shapes of its Hugging Face names."""
    vocab_size, d_model = shapes[_SHARED]
    buckets, heads = shapes[f"{_ATTENTION}.relative_attention_bias.weight"]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes[f"{_ATTENTION}.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": highest_index(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def load_t5_encoder(file: TensorFile, *, need: Need, prefix: str = "") -> nn.Module:
    """transformers' T5EncoderModel from the tensors below `prefix`, with Hugging Face names.

    Raises:
        CheckpointError: not a T5 encoder, or tensors are missing.
    """
    from transformers import T5Config, T5EncoderModel

    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    names = {ours: name for ours, name in names.items() if not ours.startswith(("decoder.", "lm_head."))}
    if _SHARED not in names and _TIED in names:
        names[_SHARED] = names[_TIED]
    if _SHARED not in names or f"{_ATTENTION}.relative_attention_bias.weight" not in names:
        raise CheckpointError(
            str(file.path), message="holds no T5 encoder (no shared embedding or relative bias); name another file"
        )
    inferred = t5_config(KnownShapes({name: file.shapes[stored] for name, stored in names.items()}, file.path))
    config = T5Config(**merge_config(inferred, file, fixed=inferred), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    names[_TIED] = names[_SHARED]
    module = load_module(
        lambda: T5EncoderModel(config),
        readers(file, names),
        path=file.path,
        part="T5 encoder",
        dtype=need.dtype,
        device=need.device,
        prepare=need.prepare_text_encoder,
    )
    module.encoder.embed_tokens.weight = module.shared.weight  # one table, as published
    return module
