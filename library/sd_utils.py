"""Load Stable Diffusion 1.x and 2.x from a single checkpoint file."""

import re
from dataclasses import replace
from typing import Any

from library.base.errors import CheckpointError
from library.base.safetensors_io import TensorFile
from library.modules import unet
from library.modules.clip import load_clip_text, load_open_clip_text
from library.modules.components import Components, Need, Variant
from library.modules.layer_names import LayerRule
from library.modules.loading import highest_index, open_model_file
from library.modules.published_view import published_view
from library.modules.vae import PREFIX as VAE
from library.modules.vae import load_vae, own_vae
from library.options.schema import OptionSet

_UNET = unet.PREFIX
_TEXT = "cond_stage_model.transformer."
_TEXT_V2 = "cond_stage_model.model."
_V2_BASE = "stable-diffusion-v2-512"


def open_checkpoint(path: str) -> TensorFile:
    """The checkpoint file of a run, checked to be a Stable Diffusion 1.x or 2.x file.

    Raises:
        CheckpointError: missing file, a directory, or another model family.
    """
    file = open_model_file("--pretrained_model_name_or_path", path)
    if f"{_UNET}label_emb.0.0.weight" in file:
        raise CheckpointError(path, message="is an SDXL checkpoint; use the sdxl_* scripts")
    if f"{_UNET}input_blocks.0.0.weight" not in file:
        raise CheckpointError(
            path,
            message=f"holds no Stable Diffusion U-Net (no tensor {_UNET}input_blocks.0.0.weight); name another file",
        )
    return file


def detect_variant(file: TensorFile, *, velocity: bool) -> Variant:
    """Version and sizes of the U-Net in an opened checkpoint; no weights are read.

    The versions are told apart by the layout of their text encoders.

    Args:
        file: the checkpoint.
        velocity: whether the model predicts the velocity, which no tensor tells.
    """
    config = unet.unet_config(unet.unet_shapes(file))
    name = "v2" if _is_v2(file) else "v1"
    return Variant(name=name, base_model_version=f"sd_{name}" + ("_v" if velocity else ""), config=config)


def _inpaints(options: OptionSet) -> bool:
    return bool(options.values().get("train_inpainting"))


def _is_v2(file: TensorFile) -> bool:
    return any(name.startswith(_TEXT_V2) for name in file.names)


def _text_prefix(file: TensorFile) -> str:
    return _TEXT_V2 if _is_v2(file) else _TEXT


def load_unet(file: TensorFile, need: Need, *, inpainting: bool = False) -> Any:
    """The U-Net with the checkpoint's weights.

    The projections around the attention of version 2.x are matrices in the file; here they are 1x1 convolutions as in
    1.x, which is the same arithmetic and gives adapters the shapes that other programs write.
    """
    return unet.load_unet(file, need, inpainting=inpainting, use_linear_projection=False)


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file = open_checkpoint(options.value("pretrained_model_name_or_path"))
    if options.value("v2") and not _is_v2(file):
        message = f"--v2 was given, but this is a Stable Diffusion 1.x checkpoint (its text encoder lies below {_TEXT})"
        raise CheckpointError(str(file.path), message=message + "; leave --v2 out")
    if unet.unet_shapes(file)["conv_in.weight"][1] == unet.INPAINTING_CHANNELS and not _inpaints(options):
        raise CheckpointError(str(file.path), message="is an inpainting model (9 channels); add --train_inpainting")
    vae_file, vae_prefix = own_vae(options.value("vae")) or (file, VAE)
    sizes = {
        "U-Net": file.num_parameters(_UNET),
        "text encoder": file.num_parameters(_text_prefix(file)),
        "VAE": vae_file.num_parameters(vae_prefix),
    }
    return replace(detect_variant(file, velocity=options.value("v_parameterization")), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or the text encoder is another one."""
    file = open_checkpoint(options.value("pretrained_model_name_or_path"))
    vae_file, vae_prefix = own_vae(options.value("vae")) or (file, VAE)
    return {"vae": vae_file.identity(vae_prefix), "text": file.identity(_text_prefix(file))}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file = open_checkpoint(options.value("pretrained_model_name_or_path"))
    vae = None
    if need.vae:
        vae_file, prefix = own_vae(options.value("vae")) or (file, VAE)
        vae = load_vae(vae_file, prefix, dtype=need.vae_dtype, device=need.device)
    encoder = _load_text_encoder(file, need) if need.text_encoders else None
    denoiser = load_unet(file, need, inpainting=_inpaints(options)) if need.denoiser else None
    return Components(
        denoiser=denoiser,
        vae=vae,
        text_encoders=[encoder],
        variant=detect_variant(file, velocity=options.value("v_parameterization")),
        source=file.path,
        published_denoiser=None if denoiser is None else published_view(denoiser, "diffusers"),
        published_text_encoders=[None if encoder is None else published_view(encoder, "clip")],
    )


def _load_text_encoder(file: TensorFile, need: Need) -> Any:
    if not _is_v2(file):
        return load_clip_text(file, _TEXT, need=need)
    # version 2.x reads the states before the last block of OpenCLIP's tower
    layers = highest_index(file.names, re.escape(_TEXT_V2) + r"transformer\.resblocks\.(\d+)\.") - 1
    return load_open_clip_text(file, _TEXT_V2, num_layers=layers, need=need, part="OpenCLIP text encoder")


def diffusers_layers(variant: Variant) -> tuple[LayerRule, ...]:
    """Names of the U-Net's layers in diffusers: our own; projections of version 2.x are linear there."""
    flat = LayerRule(pattern=r"(.*\.proj_(?:in|out))", names=(r"\1",), flat=True)
    return (*((flat,) if variant.name == "v2" else ()), LayerRule(pattern="(.*)", names=(r"\1",)))


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata."""
    velocity = variant.base_model_version.endswith("_v")
    architectures = {"v1": "stable-diffusion-v1", "v2": "stable-diffusion-v2-768-v" if velocity else _V2_BASE}
    return {
        "architecture": architectures[variant.name],
        "implementation": "diffusers",
        "resolution": "768x768" if variant.name == "v2" and velocity else "512x512",
        "prediction_type": "v" if velocity else "epsilon",
    }
