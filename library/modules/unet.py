"""diffusers' U-Net from a checkpoint in the original layout: names of both layouts, sizes from shapes, loading."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Need
from library.modules.loading import highest_index, load_module, merge_config

PREFIX = "model.diffusion_model."
INPAINTING_CHANNELS = 9  # noisy latents 4, mask 1, latents of what is kept 4
NUM_SIZE_FEATURES = 6 * 256  # of a vector input: sinusoids of six numbers that tell of sizes

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP = {
    "input_blocks.0.0.": "conv_in.",
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}


def unet_names(original: Iterable[str]) -> dict[str, str]:
    """diffusers name -> original name, for the tensors of a U-Net in the original layout (SD 1/2, SDXL)."""
    original = list(original)
    downsamples = sorted(
        int(match[1]) for name in original if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    layers = downsamples[0] - 1 if downsamples else highest_index(original, r"input_blocks\.(\d+)\.") - 1
    prefixes = _prefixes(layers, len(downsamples) + 1, original)
    return {_translate(name, prefixes): name for name in original}


def _prefixes(layers: int, levels: int, names: Iterable[str]) -> dict[str, str]:
    """Original prefix -> diffusers prefix of every block; an upsampler's index depends on the attention before it."""
    names = list(names)
    table = dict(_TOP)
    for level in range(levels):
        for layer in range(layers):
            block = f"input_blocks.{level * (layers + 1) + layer + 1}."
            table[f"{block}0."] = f"down_blocks.{level}.resnets.{layer}."
            table[f"{block}1."] = f"down_blocks.{level}.attentions.{layer}."
        table[f"input_blocks.{(level + 1) * (layers + 1)}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}."
            table[f"{block}0."] = f"up_blocks.{level}.resnets.{layer}."
            upsampler = next((k for k in (1, 2) if f"{block}{k}.conv.weight" in names), None)
            if upsampler is not None:
                table[f"{block}{upsampler}.conv."] = f"up_blocks.{level}.upsamplers.0.conv."
            table[f"{block}1."] = table.get(f"{block}1.", f"up_blocks.{level}.attentions.{layer}.")
    return table


def _translate(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default="")
    rest = name[len(prefix) :]
    target = prefixes.get(prefix, "")
    if ".resnets." in target:
        for theirs, ours in _RESNET.items():
            if rest.startswith(theirs + "."):
                rest = ours + rest[len(theirs) :]
                break
    return target + rest


def unet_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel from the shapes of its own names.

    Head counts are not visible in shapes: with convolutional projections (SD 1.x) every level has 8 heads; with linear
    ones (SD 2.x, SDXL) heads are 64 wide.
    """
    levels = highest_index(shapes, r"down_blocks\.(\d+)\.")
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)]
    attended = [f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in range(levels)]
    depth = [
        max(1, highest_index(shapes, rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)\."))
        for level in range(levels)
    ]
    linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    up = list(reversed(attended))
    vector = {}
    if "add_embedding.linear_1.weight" in shapes:
        vector = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        }
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": highest_index(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in up],
        "transformer_layers_per_block": depth,
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, count // 64) for count in channels] if linear else 8,
        **vector,
    }


def unet_tensors(file: TensorFile) -> dict[str, str]:
    """diffusers name -> name in the file."""
    bare = [name.removeprefix(PREFIX) for name in file.names if name.startswith(PREFIX)]
    return {ours: PREFIX + theirs for ours, theirs in unet_names(bare).items()}


def unet_shapes(file: TensorFile) -> KnownShapes:
    """Shapes by diffusers name."""
    return KnownShapes({ours: file.shapes[theirs] for ours, theirs in unet_tensors(file).items()}, file.path)


def load_unet(file: TensorFile, need: Need, *, inpainting: bool = False, **changes: Any) -> Any:
    """diffusers' UNet2DConditionModel with the checkpoint's weights.

    With `inpainting` it takes nine channels; those that the file does not have begin at zero.

    Args:
        file: the checkpoint.
        need: number format and place.
        inpainting: whether the model sees a mask and what is kept.
        changes: arguments of the U-Net that differ from what the shapes say.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors.
    """
    from diffusers import UNet2DConditionModel

    config = merge_config(
        unet_config(unet_shapes(file)),
        file,
        fixed=("in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "layers_per_block"),
    )
    config |= changes
    if inpainting:
        config["in_channels"] = INPAINTING_CHANNELS
    reading = partial(
        _read_unet_tensor,
        file,
        in_channels=config["in_channels"],
        convolutions=not config["use_linear_projection"],
    )
    return load_module(
        lambda: UNet2DConditionModel(**config),
        {ours: partial(reading, ours, theirs) for ours, theirs in unet_tensors(file).items()},
        path=file.path,
        part="U-Net",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _read_unet_tensor(file: TensorFile, ours: str, theirs: str, *, in_channels: int, convolutions: bool) -> Tensor:
    tensor = file.tensor(theirs)
    if ours == "conv_in.weight" and tensor.shape[1] < in_channels:
        missing = tensor.new_zeros(tensor.shape[0], in_channels - tensor.shape[1], *tensor.shape[2:])
        return torch.cat((tensor, missing), dim=1)
    projects = ours.endswith((".proj_in.weight", ".proj_out.weight"))
    return tensor[:, :, None, None] if projects and convolutions and tensor.ndim == 2 else tensor
