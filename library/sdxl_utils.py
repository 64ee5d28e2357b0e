"""Load Stable Diffusion XL from a single checkpoint file."""

from dataclasses import replace
from typing import Any

from library.base.errors import CheckpointError
from library.base.safetensors_io import TensorFile
from library.modules import unet
from library.modules.clip import load_clip_text, load_projected_open_clip_text
from library.modules.components import Components, Need, Variant
from library.modules.loading import open_model_file
from library.modules.published_view import published_view
from library.modules.vae import PREFIX as VAE
from library.modules.vae import load_vae, own_vae
from library.options.schema import OptionSet

_TEXT_1 = "conditioner.embedders.0.transformer."
_TEXT_2 = "conditioner.embedders.1.model."
_REFINER_TEXT = "conditioner.embedders.0.model."
_UNET_MARK = f"{unet.PREFIX}label_emb.0.0.weight"
# parts that a whole checkpoint has, by a tensor of each
_PARTS = {
    "U-Net": f"{unet.PREFIX}input_blocks.0.0.weight",
    "CLIP-L text encoder": f"{_TEXT_1}text_model.embeddings.token_embedding.weight",
    "OpenCLIP bigG text encoder": f"{_TEXT_2}token_embedding.weight",
}
_VELOCITY_MARKS = ("v_pred", "ztsnr")  # empty tensors by which such models are marked


def open_checkpoint(path: str) -> TensorFile:
    """The checkpoint file of a run, checked to be a whole SDXL base model.

    Raises:
        CheckpointError: missing file, a directory, a refiner, a part of a model, or another model family.
    """
    file = open_model_file("--pretrained_model_name_or_path", path)
    if any(name.startswith("cond_stage_model.") for name in file.names):
        raise CheckpointError(path, message="is a Stable Diffusion 1.x or 2.x checkpoint; use train_network.py")
    if any(name.startswith(_REFINER_TEXT) for name in file.names):
        raise CheckpointError(path, message="is an SDXL refiner, which has one text encoder; name a base model")
    if any(name.startswith("down_blocks.") for name in file.names):
        raise CheckpointError(path, message="is a U-Net in the diffusers layout; the published single file is needed")
    if _UNET_MARK not in file:
        raise CheckpointError(path, message=f"holds no SDXL U-Net (no tensor {_UNET_MARK}); name another file")
    for part, mark in _PARTS.items():
        if mark not in file:
            raise CheckpointError(path, message=f"has no {part} (no tensor {mark}); a whole checkpoint is needed")
    return file


def _check_kind(file: TensorFile, options: OptionSet) -> None:
    """What the file says of itself agrees with the options."""
    inpaints = unet.unet_shapes(file)["conv_in.weight"][1] == unet.INPAINTING_CHANNELS
    if inpaints and not _inpaints(options):
        raise CheckpointError(str(file.path), message="is an inpainting model (9 channels); add --train_inpainting")
    stated = file.metadata.get("modelspec.prediction_type", "")
    marked = [name for name in _VELOCITY_MARKS if name in file] + (["modelspec"] if stated.startswith("v") else [])
    if marked and not options.value("v_parameterization"):
        terminal = " and --zero_terminal_snr" if "ztsnr" in marked else ""
        message = f"predicts velocity (its mark: {', '.join(marked)}); add --v_parameterization{terminal}"
        raise CheckpointError(str(file.path), message=message)


def _inpaints(options: OptionSet) -> bool:
    return bool(options.values().get("train_inpainting"))


def _variant(file: TensorFile, options: OptionSet) -> Variant:
    name = "v" if options.value("v_parameterization") else "base"
    config = unet.unet_config(unet.unet_shapes(file))
    return Variant(name=name, base_model_version="sdxl_base_v1-0", config=config)


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file = open_checkpoint(options.value("pretrained_model_name_or_path"))
    _check_kind(file, options)
    vae_file, vae_prefix = own_vae(options.value("vae")) or (file, VAE)
    sizes = {
        "U-Net": file.num_parameters(unet.PREFIX),
        "CLIP-L": file.num_parameters(_TEXT_1),
        "OpenCLIP bigG": file.num_parameters(_TEXT_2),
        "VAE": vae_file.num_parameters(vae_prefix),
    }
    return replace(_variant(file, options), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or a text encoder is another one."""
    file = open_checkpoint(options.value("pretrained_model_name_or_path"))
    vae_file, vae_prefix = own_vae(options.value("vae")) or (file, VAE)
    return {"vae": vae_file.identity(vae_prefix), "text": file.identity(_TEXT_1) + file.identity(_TEXT_2)}


def load_unet(file: TensorFile, need: Need, *, inpainting: bool = False) -> Any:
    """The U-Net with the checkpoint's weights."""
    return unet.load_unet(file, need, inpainting=inpainting)


def load_text_encoders(file: TensorFile, need: Need) -> list[Any]:
    """CLIP-L, and OpenCLIP bigG with its projection."""
    return [
        load_clip_text(file, _TEXT_1, need=need, part="CLIP-L text encoder"),
        load_projected_open_clip_text(file, _TEXT_2, need=need, part="OpenCLIP bigG text encoder"),
    ]


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
    encoders = load_text_encoders(file, need) if need.text_encoders else [None, None]
    denoiser = load_unet(file, need, inpainting=_inpaints(options)) if need.denoiser else None
    return Components(
        denoiser=denoiser,
        vae=vae,
        text_encoders=encoders,
        variant=_variant(file, options),
        source=file.path,
        published_denoiser=None if denoiser is None else published_view(denoiser, "sgm"),
        published_text_encoders=[None if one is None else published_view(one, "clip") for one in encoders],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata."""
    return {
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "resolution": "1024x1024",
        "prediction_type": "v" if variant.name == "v" else "epsilon",
    }
