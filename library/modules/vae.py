"""diffusers' AutoencoderKL from published files: key names of both layouts, sizes from shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.loading import Reader, highest_index, load_module, merge_config, open_model_file, readers
from library.strategy_base import LatentsCachingStrategy

PREFIX = "first_stage_model."  # in whole checkpoints
_MARK = "encoder.conv_in.weight"
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_names(original: Iterable[str]) -> dict[str, str]:
    """diffusers name -> original name, for the tensors of an autoencoder in the original (LDM) layout."""
    original = list(original)
    levels = highest_index(original, r"decoder\.up\.(\d+)\.")
    return {_diffusers_name(name, levels): name for name in original}


def _diffusers_name(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name):
        inner = "resnets." if match[2] == "block" else "upsamplers.0."
        name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{inner}{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid\.block_(\d)\.(.*)", name):
        name = f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(.*)", name):
        name = f"{match[1]}.mid_block.attentions.0.{_ATTENTION[match[2]]}.{match[3]}"
    name = name.replace("nin_shortcut", "conv_shortcut")
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes of an autoencoder from the shapes of its diffusers names."""
    levels = highest_index(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)
        ],
        "layers_per_block": highest_index(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _linear(reader: Reader) -> Reader:
    """Attention projections are 1x1 convolutions in original files and linear layers in diffusers."""

    def read() -> Tensor:
        tensor = reader()
        return tensor.flatten(1) if tensor.ndim == 4 else tensor

    return read


def load_vae(file: TensorFile, prefix: str, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """diffusers' AutoencoderKL from the tensors below `prefix`, in the original or the diffusers layout.

    Raises:
        CheckpointError: the file holds no autoencoder below `prefix`.
    """
    from diffusers import AutoencoderKL

    bare = [name.removeprefix(prefix) for name in file.names if name.startswith(prefix)]
    if _MARK not in bare:
        raise CheckpointError(
            str(file.path), message=f"holds no autoencoder (no encoder.conv_in below {prefix!r}); name another file"
        )
    names = {name: name for name in bare} if _is_diffusers(bare) else vae_names(bare)
    stored = {ours: prefix + original for ours, original in names.items()}
    config = merge_config(
        vae_config(KnownShapes({ours: file.shapes[original] for ours, original in stored.items()}, file.path)),
        file,
        fixed=("latent_channels",),
    )
    level = len(config["block_out_channels"])
    tensors = {
        name: _linear(reader) if ".attentions." in name else reader for name, reader in readers(file, stored).items()
    }
    return load_module(
        lambda: AutoencoderKL(
            **config,
            down_block_types=("DownEncoderBlock2D",) * level,
            up_block_types=("UpDecoderBlock2D",) * level,
        ),
        tensors,
        path=file.path,
        part="autoencoder",
        dtype=dtype,
        device=device,
    )


def own_vae(path: str | None) -> tuple[TensorFile, str] | None:
    """The file of `--vae` and the prefix of its tensors; None where the model's own is used.

    Such files hold bare names, or those of a whole checkpoint.

    Raises:
        CheckpointError: no such file, or it holds no autoencoder.
    """
    if not path:
        return None
    file = open_model_file("--vae", path)
    for prefix in (PREFIX, ""):
        if prefix + _MARK in file:
            return file, prefix
    raise CheckpointError("--vae", path, f"holds no VAE (no tensor {_MARK}); name another file")


def _is_diffusers(names: Iterable[str]) -> bool:
    return any(name.startswith("encoder.down_blocks.") for name in names)


def encode_mode(vae: nn.Module, images: Tensor) -> Tensor:
    """Mode of the posterior: images [B, 3, h, w] in [-1, 1] -> [B, C, H, W] float32, unscaled."""
    reference = next(vae.parameters())
    return vae.encode(images.to(reference.device, reference.dtype)).latent_dist.mode().float()


def encode_sample(vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """A posterior sample with the given unit noise [B, C, H, W]; shapes as `encode_mode`."""
    reference = next(vae.parameters())
    posterior = vae.encode(images.to(reference.device, reference.dtype)).latent_dist
    return posterior.mean.float() + posterior.std.float() * noise.to(reference.device)


class AutoencoderLatents(LatentsCachingStrategy):
    """Latents of an autoencoder of diffusers as (z - shift) * scale."""

    def __init__(self, shift: float = 0.0, scale: float = 1.0) -> None:
        self.shift = shift
        self.scale = scale

    def encode(self, vae: nn.Module, images: Tensor) -> Tensor:
        """See the base class."""
        return (encode_mode(vae, images) - self.shift) * self.scale

    def encode_sample(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """See the base class."""
        return (encode_sample(vae, images, noise) - self.shift) * self.scale


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Unscaled latents [B, C, H, W] -> images [B, 3, h, w] in [-1, 1] float32."""
    reference = next(vae.parameters())
    return vae.decode(latents.to(reference.device, reference.dtype)).sample.float().clamp(-1, 1)
