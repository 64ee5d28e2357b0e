"""diffusers' AutoencoderKLQwenImage from published files, for single images.

The autoencoder is one for video; an image is a video of one frame, of which only this module knows.
Shapes: B batch, h, w pixels, C latent channels, H = h/8, W = w/8.
"""

import re
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.base.errors import CheckpointError
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.loading import highest_index, load_module, merge_config, readers

MARKS = ("encoder.conv_in.weight", "encoder.conv1.weight")  # diffusers' layout, Wan's layout
_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_ENDS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
}


def vae_names(wan: Iterable[str]) -> dict[str, str]:
    """diffusers name -> Wan's name, for the tensors of a file in Wan's layout."""
    wan = list(wan)
    first = min(int(match[1]) for name in wan if (match := re.match(r"decoder\.upsamples\.(\d+)\.resample", name)))
    return {_diffusers_name(name, first + 1): name for name in wan}


def _diffusers_name(name: str, per_level: int) -> str:
    """Args: a Wan name; entries of a level of the decoder: its residual blocks and what enlarges their output."""
    module, leaf = name.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{leaf}"
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.([02])\.residual\.(\d)", module):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) // 2}.{_RESIDUAL[match[3]]}.{leaf}"
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.1\.(\w+)", module):
        return f"{match[1]}.mid_block.attentions.0.{match[2]}.{leaf}"
    match = re.fullmatch(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(.*)", module)
    if match is None:
        return name
    index = int(match[2])
    if match[1] == "encoder.down":
        place = f"encoder.down_blocks.{index}"
    elif index % per_level == per_level - 1:
        place = f"decoder.up_blocks.{index // per_level}.upsamplers.0"
    else:
        place = f"decoder.up_blocks.{index // per_level}.resnets.{index % per_level}"
    inner = re.sub(r"residual\.(\d)", lambda found: _RESIDUAL[found[1]], match[3]).replace("shortcut", "conv_shortcut")
    return f"{place}.{inner}.{leaf}"


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes from the shapes of diffusers' names."""
    base = shapes["encoder.conv_in.weight"][0]
    widths: list[int] = []
    temporal: list[bool] = []
    entries = highest_index(shapes, r"encoder\.down_blocks\.(\d+)\.")
    resamplers = [index for index in range(entries) if f"encoder.down_blocks.{index}.resample.1.weight" in shapes]
    for index in (*resamplers, entries):
        widths.append(shapes[f"encoder.down_blocks.{index - 1}.conv2.weight"][0])
        if index < entries:
            temporal.append(f"encoder.down_blocks.{index}.time_conv.weight" in shapes)
    return {
        "base_dim": base,
        "z_dim": shapes["decoder.conv_in.weight"][1],
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": resamplers[0] if resamplers else entries,
        "temperal_downsample": temporal,
        "input_channels": shapes["encoder.conv_in.weight"][1],
    }


class QwenImageVae(nn.Module):
    """The autoencoder for images: latents are normalised per channel, (z - mean) / std.

    Args:
        inner: diffusers' model.
        frames_cached: keep what later frames would need, as for video; changes no image.
    """

    def __init__(self, inner: nn.Module, *, frames_cached: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.frames_cached = frames_cached

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.inner.config.latents_mean, self.inner.config.latents_std
        return (torch.tensor(one, device=like.device).view(1, -1, 1, 1) for one in (mean, std))

    def _posterior(self, images: Tensor) -> Any:
        reference = next(self.parameters())
        frames = images.to(reference.device, reference.dtype)[:, :, None]
        if self.frames_cached:
            return self.inner.encode(frames).latent_dist
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(self.inner.quant_conv(self.inner.encoder(frames)))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents.

        Args:
            images: [B, 3, h, w] in [-1, 1].
            noise: unit noise [B, C, H, W] for a posterior sample; the posterior's mode without it.

        Returns:
            [B, C, H, W] float32.
        """
        posterior = self._posterior(images)
        latents = posterior.mode().float()[:, :, 0]
        if noise is not None:
            latents = latents + posterior.std.float()[:, :, 0] * noise.to(latents.device)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, H, W] -> images [B, 3, h, w] in [-1, 1] float32."""
        reference = next(self.parameters())
        wide = latents.to(reference.device).float()
        mean, std = self._statistics(wide)
        frames = (wide * std + mean).to(reference.dtype)[:, :, None]
        if self.frames_cached:
            images = self.inner.decode(frames).sample
        else:
            images = self.inner.decoder(self.inner.post_quant_conv(frames))
        return images[:, :, 0].float().clamp(-1, 1)


def load_qwen_image_vae(
    file: TensorFile,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    frames_cached: bool = True,
    flat: bool = False,
    chunk: int | None = None,
) -> QwenImageVae:
    """The autoencoder of a file in diffusers' or Wan's layout.

    Args:
        file: of the weights.
        dtype: of the weights.
        device: of the weights.
        frames_cached: see `QwenImageVae`.
        flat: compute with two-dimensional convolutions: the same for single images, with less work.
        chunk: rows that a convolution handles at a time; all when None.

    Raises:
        CheckpointError: another file, or one whose latents have unknown mean and deviation.
    """
    from diffusers import AutoencoderKLQwenImage

    names = file_names(file)
    inferred = vae_config(KnownShapes({ours: file.shapes[stored] for ours, stored in names.items()}, file.path))
    known = inferred["z_dim"] == len(_MEAN)
    statistics = {"latents_mean": list(_MEAN) if known else None, "latents_std": list(_STD) if known else None}
    config = merge_config({**inferred, **statistics}, file, fixed=inferred)
    for name in statistics:
        if config[name] is None or len(config[name]) != inferred["z_dim"]:
            message = f"has {inferred['z_dim']} latent channels; its metadata must give {name} for each in `config`"
            raise CheckpointError(str(file.path), message=message)
    inner = load_module(
        lambda: AutoencoderKLQwenImage(**config),
        readers(file, names),
        path=file.path,
        part="Qwen-Image autoencoder",
        dtype=dtype,
        device=device,
    )
    if flat:
        flatten(inner)
    if chunk is not None:
        compute_in_chunks(inner, chunk)
    return QwenImageVae(inner, frames_cached=frames_cached and not flat).eval().requires_grad_(False)


def file_names(file: TensorFile) -> dict[str, str]:
    """diffusers name -> name in the file.

    Raises:
        CheckpointError: the file holds no such autoencoder.
    """
    if MARKS[0] in file and len(file.shapes[MARKS[0]]) == 5:
        return {name: name for name in file.names}
    if MARKS[1] in file and len(file.shapes[MARKS[1]]) == 5:
        return vae_names(file.names)
    raise CheckpointError(
        str(file.path), message=f"holds no Qwen-Image VAE (no five-dimensional {' or '.join(MARKS)}); name another file"
    )


# --- single frames ----------------------------------------------------------------------------------------------------


class FlatConvolution(nn.Module):
    """What a causal convolution does to a first frame: those before it are zeros, so only its last slice counts."""

    def __init__(self, causal: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(causal.weight[:, :, -1].contiguous(), requires_grad=False)
        self.bias = causal.bias
        self.spatial_padding = causal._padding[:4]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1, H, W] -> [B, D, 1, H, W]."""
        return functional.conv2d(functional.pad(x[:, :, 0], self.spatial_padding), self.weight, self.bias)[:, :, None]


def flatten(vae: nn.Module) -> None:
    """Replace the causal convolutions by what they do to single frames, and drop those over time."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if name == "time_conv":
                module.time_conv = None  # used from the second frame on
            elif _is_causal(child):
                setattr(module, name, FlatConvolution(child))


def _is_causal(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv3d) and hasattr(module, "_padding")


def compute_in_chunks(vae: nn.Module, rows: int) -> None:
    """Let large convolutions work on bands of rows: less memory beside weights and features.

    Args:
        vae: diffusers' model, flattened or not.
        rows: of a band of the convolution's output.
    """
    for module in vae.modules():
        flat = isinstance(module, FlatConvolution)
        if (flat or _is_causal(module)) and max(module.weight.shape[2:]) > 1:
            module.forward = MethodType(_banded(rows, flat=flat), module)


def _banded(rows: int, *, flat: bool) -> Any:
    def forward(layer: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if flat:
            padded = functional.pad(x[:, :, 0], layer.spatial_padding)
        else:
            padding = list(layer._padding)
            if cache_x is not None and padding[4] > 0:
                x = torch.cat((cache_x.to(x.device), x), dim=2)
                padding[4] -= cache_x.shape[2]
            padded = functional.pad(x, padding)
        more = layer.weight.shape[-2] - 1
        convolve = functional.conv2d if flat else functional.conv3d
        stride = 1 if flat else layer.stride
        bands = [
            convolve(padded[..., start : start + rows + more, :], layer.weight, layer.bias, stride)
            for start in range(0, padded.shape[-2] - more, rows)
        ]
        joined = torch.cat(bands, dim=-2)
        return joined[:, :, None] if flat else joined

    return forward
