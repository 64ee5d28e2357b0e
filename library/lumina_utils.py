"""Load Lumina Image 2.0 from its published files: transformer, autoencoder, Gemma-2."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from library.base.errors import CheckpointError, Problem, UserError, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.lumina_models import PATCH, LuminaParams, NextDiT
from library.modules.components import Components, Need, Variant
from library.modules.gemma2 import GEMMA2_MARK, gemma2_names, load_gemma2
from library.modules.layer_names import LayerRule, grouped
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.vae import load_vae
from library.options.schema import OptionSet

_PREFIX = "model.diffusion_model."
_VAE_PREFIX = "vae."
_MARK = "cap_embedder.0.weight"
_QKV = "layers.0.attention.qkv.weight"
_UNUSED = "norm_final.weight"
_VAE_MARK = "encoder.conv_in.weight"
_FLAG = "--pretrained_model_name_or_path"
# what the file of another part or model would be mistaken for, by a name that only it has
_FOREIGN = {
    "time_caption_embed.caption_embedder.0.weight": "is in the diffusers layout; the published single file is needed",
    "cap_pad_token": "is a Z-Image checkpoint, which this version cannot train",
    "layers.0.attention.wq.weight": "is a Lumina-Next checkpoint; Lumina Image 2.0 is needed",
    "double_blocks.0.img_attn.norm.query_norm.scale": "is a FLUX.1 checkpoint; train it with flux_train_network.py",
    "encoder.conv_in.weight": "is an autoencoder, for --ae; name the transformer",
    "embed_tokens.weight": "is a Gemma-2 text encoder, for --gemma2; name the transformer",
    "model.embed_tokens.weight": "is a Gemma-2 text encoder, for --gemma2; name the transformer",
}


_BLOCK = r"(layers|noise_refiner|context_refiner)\.(\d+)"
DIFFUSERS_LAYERS: tuple[LayerRule, ...] = (
    LayerRule(
        pattern=rf"{_BLOCK}\.attention\.qkv",
        names=tuple(rf"\1.\2.attn.to_{part}" for part in "qkv"),
        parts=grouped,
    ),
    LayerRule(pattern=rf"{_BLOCK}\.attention\.out", names=(r"\1.\2.attn.to_out.0",)),
    LayerRule(pattern=rf"{_BLOCK}\.feed_forward\.w([123])", names=(r"\1.\2.feed_forward.linear_\3",)),
    LayerRule(pattern=rf"{_BLOCK}\.adaLN_modulation\.1", names=(r"\1.\2.norm1.linear",)),
    LayerRule(pattern=r"x_embedder", names=("x_embedder",)),
    LayerRule(pattern=r"cap_embedder\.1", names=("time_caption_embed.caption_embedder.1",)),
    LayerRule(pattern=r"t_embedder\.mlp\.0", names=("time_caption_embed.timestep_embedder.linear_1",)),
    LayerRule(pattern=r"t_embedder\.mlp\.2", names=("time_caption_embed.timestep_embedder.linear_2",)),
    LayerRule(pattern=r"final_layer\.adaLN_modulation\.1", names=("norm_out.linear_1",)),
    LayerRule(pattern=r"final_layer\.linear", names=("norm_out.linear_2",)),
)


def open_transformer(path: str) -> tuple[TensorFile, str]:
    """The transformer's file and the prefix of its tensors.

    Raises:
        CheckpointError: missing file or another model.
    """
    file = open_model_file(_FLAG, path)
    prefix = _PREFIX if _PREFIX + _MARK in file else ""
    for name, reason in _FOREIGN.items():
        if prefix + name in file:
            raise CheckpointError(path, message=reason)
    for name in (_MARK, _QKV):
        if prefix + name not in file:
            message = f"holds no Lumina Image 2.0 transformer (no tensor {name}); name the published single file"
            raise CheckpointError(path, message=message)
    return file, prefix


def lumina_params(file: TensorFile, prefix: str) -> LuminaParams:
    """Sizes of the transformer from tensor shapes; `config` in the file's metadata may set the rotary axes."""
    bare = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    shapes = KnownShapes(bare, file.path)
    hidden, patch_channels = shapes["x_embedder.weight"]
    head_size = shapes["layers.0.attention.q_norm.weight"][0]
    query_size = shapes["layers.0.attention.out.weight"][1]
    config = merge_config(
        {
            "in_channels": patch_channels // PATCH**2,
            "hidden_size": hidden,
            "num_layers": highest_index(shapes, r"layers\.(\d+)\."),
            "num_refiner_layers": highest_index(shapes, r"noise_refiner\.(\d+)\."),
            "num_attention_heads": query_size // head_size,
            "num_kv_heads": (shapes[_QKV][0] - query_size) // (2 * head_size),
            "axes_dim_rope": [head_size // 3] * 3,
            "norm_eps": 1e-5,
        },
        file,
        fixed=("in_channels", "hidden_size", "num_layers", "num_attention_heads", "num_kv_heads"),
    )
    return LuminaParams(
        in_channels=config["in_channels"],
        hidden_size=hidden,
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_kv_heads"],
        mlp_size=shapes["layers.0.feed_forward.w1.weight"][0],
        cap_feat_dim=shapes[_MARK][0],
        time_size=shapes["t_embedder.mlp.2.weight"][0],
        num_layers=config["num_layers"],
        num_refiner_layers=config["num_refiner_layers"],
        num_context_layers=highest_index(shapes, r"context_refiner\.(\d+)\."),
        axes_dim=tuple(config["axes_dim_rope"]),
        norm_eps=config["norm_eps"],
    )


def _variant(params: LuminaParams) -> Variant:
    return Variant(name="lumina2", base_model_version="lumina2", config={"params": params})


def load_transformer(file: TensorFile, prefix: str, need: Need) -> Any:
    """The transformer with the file's weights."""
    params = lumina_params(file, prefix)
    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    tensors = readers(file, names)
    # some files leave out what nothing uses
    tensors.setdefault(_UNUSED, lambda: torch.ones(params.hidden_size))
    return load_module(
        lambda: NextDiT(params),
        tensors,
        path=file.path,
        part="Lumina Image 2.0 transformer",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _required_files(options: OptionSet, names: Iterable[str]) -> dict[str, TensorFile]:
    """Opened files of the given flags; all that are missing are reported together."""
    meaning = {"gemma2": "the Gemma-2 text encoder", "ae": "the autoencoder"}
    names = list(names)
    raise_problems(
        Problem(f"--{name}", f"is needed: the file of {meaning[name]}") for name in names if not options.value(name)
    )
    return {name: open_model_file(f"--{name}", options.value(name)) for name in names}


def _vae_prefix(file: TensorFile) -> str:
    return _VAE_PREFIX if _VAE_PREFIX + _VAE_MARK in file else ""


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
        UserError: more blocks to swap than the model can do without.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    opened = _required_files(options, ("gemma2", "ae"))
    gemma, ae = opened["gemma2"], opened["ae"]
    if not gemma2_names(gemma.names):
        message = f"holds no Gemma-2 text encoder (no tensor {GEMMA2_MARK}); name another file"
        raise CheckpointError("--gemma2", options.value("gemma2"), message)
    if _vae_prefix(ae) + _VAE_MARK not in ae:
        message = f"holds no autoencoder (no tensor {_VAE_MARK}); name another file"
        raise CheckpointError("--ae", options.value("ae"), message)
    params = lumina_params(file, prefix)
    swapped = options.values().get("blocks_to_swap") or 0
    if swapped > params.num_layers:  # the refiners, which come first, stay
        raise UserError("--blocks_to_swap", swapped, f"this model has {params.num_layers} blocks that can be swapped")
    sizes = {
        "transformer": file.num_parameters(prefix),
        "Gemma-2": sum(math.prod(gemma.shapes[name]) for name in gemma2_names(gemma.names).values()),
        "VAE": ae.num_parameters(_vae_prefix(ae)),
    }
    return replace(_variant(params), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or the text encoder is another one."""
    files = _required_files(options, ("gemma2", "ae"))
    gemma = files["gemma2"]
    stored = gemma2_names(gemma.names).get("embed_tokens.weight", "")
    return {
        "vae": files["ae"].identity(_vae_prefix(files["ae"])),
        "text": gemma.identity(stored.removesuffix("embed_tokens.weight")),
    }


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    files = _required_files(options, (["gemma2"] if need.text_encoders else []) + (["ae"] if need.vae else []))
    transformer = load_transformer(file, prefix, need) if need.denoiser else None
    gemma = load_gemma2(files["gemma2"], need=need) if need.text_encoders else None
    vae = None
    if need.vae:
        ae = files["ae"]
        vae = load_vae(ae, _vae_prefix(ae), dtype=need.vae_dtype, device=need.device)
    return Components(
        denoiser=transformer,
        vae=vae,
        text_encoders=[gemma],
        variant=_variant(lumina_params(file, prefix)),
        source=file.path,
        published_denoiser=transformer,
        published_text_encoders=[gemma],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata, as other programs write them."""
    del variant
    return {
        "architecture": "lumina-2",
        "implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        "prediction_type": "epsilon",
        "resolution": "1024x1024",
    }
