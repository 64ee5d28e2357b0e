"""The autoencoder of HunyuanImage 2.1: diffusers' AutoencoderKLHunyuanImage from its published file.

Shapes: B batch, h, w pixels, C latent channels, H = h/32, W = w/32.
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
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config, readers

SCALE = 0.75289
MARK = "decoder.up.0.upsample.conv.weight"  # the levels of other autoencoders are numbered the other way round
_ATTENTION = {"norm": "norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj"}


def vae_names(stored: Iterable[str]) -> dict[str, str]:
    """diffusers name -> name in the file; diffusers numbers residual blocks and changes of size together."""
    stored = list(stored)
    return {_diffusers_name(name, stored): name for name in stored}


def _diffusers_name(name: str, names: list[str]) -> str:
    name = name.replace("nin_shortcut", "conv_shortcut")
    if match := re.match(r"(encoder|decoder)\.mid\.block_(\d)\.(.*)", name):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(.*)", name):
        return f"{match[1]}.mid_block.attentions.0.{_ATTENTION[match[2]]}.{match[3]}"
    if match := re.match(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.(.*)", name):
        side, level, block, rest = match.groups()
        start = sum(_entries(names, side, earlier) for earlier in range(int(level)))
        index = start + (int(block) if block is not None else _blocks(names, side, int(level)))
        return f"{side}_blocks.{index}.{rest}"
    return name


def _blocks(names: list[str], side: str, level: int) -> int:
    return highest_index(names, rf"{re.escape(side)}\.{level}\.block\.(\d+)\.")


def _entries(names: list[str], side: str, level: int) -> int:
    sample = any(re.match(rf"{re.escape(side)}\.{level}\.(?:down|up)sample\.", name) for name in names)
    return _blocks(names, side, level) + sample


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes from the shapes of the file's names."""
    levels = highest_index(shapes, r"encoder\.down\.(\d+)\.")
    factor = 2 ** sum(f"encoder.down.{level}.downsample.conv.weight" in shapes for level in range(levels))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": highest_index(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "spatial_compression_ratio": factor,
        "sample_size": 12 * factor,
        "scaling_factor": SCALE,
    }


def load_vae(file: TensorFile, need: Need, rows: int | None = None) -> nn.Module:
    """The autoencoder of a file.

    Args:
        file: with the published names.
        need: number format and place.
        rows: of bands in which large convolutions work; all at once when None.

    Raises:
        CheckpointError: the file holds another autoencoder, or tensors are missing.
    """
    from diffusers import AutoencoderKLHunyuanImage

    if MARK not in file:
        message = f"holds no HunyuanImage VAE (no tensor {MARK}); name another file"
        raise CheckpointError("--vae", str(file.path), message)
    config = merge_config(vae_config(KnownShapes(file.shapes, file.path)), file, fixed=("latent_channels",))
    vae = load_module(
        lambda: AutoencoderKLHunyuanImage(**config),
        readers(file, vae_names(file.names)),
        path=file.path,
        part="HunyuanImage VAE",
        dtype=need.vae_dtype,
        device=need.device,
    )
    if rows is not None:
        compute_in_bands(vae, rows)
    return vae


def compute_in_bands(vae: nn.Module, rows: int) -> None:
    """Let convolutions of three pixels work on bands of rows: less memory beside weights and features."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1):
            module.forward = MethodType(_banded(rows), module)


def _banded(rows: int) -> Any:
    def forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
        padded = functional.pad(x, (1, 1, 1, 1))
        bands = [
            functional.conv2d(padded[..., start : start + rows + 2, :], layer.weight, layer.bias)
            for start in range(0, x.shape[-2], rows)
        ]
        return torch.cat(bands, dim=-2)

    return forward
