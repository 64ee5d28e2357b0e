"""Published models at their real sizes: files with their names and shapes, and no data, load tensor by tensor."""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.runs import GOLDEN

from library.base.errors import CheckpointError
from library.base.lazy import resolve
from library.base.safetensors_io import TensorFile
from library.modules import unet
from library.modules.components import Components, Need, Variant
from library.modules.published_view import published_state_names
from library.train_util import load_family, make_options

pytestmark = pytest.mark.parity
Shapes = dict[str, list[int]]
META = Need(dtype=torch.bfloat16, vae_dtype=torch.bfloat16, device=torch.device("meta"))
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT, TEXT_V2 = "cond_stage_model.transformer.", "cond_stage_model.model."
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
POSITIONS = {"text_model.embeddings.position_ids": [1, 77]}
PROJECTION = {"text_projection.weight": [768, 768]}


def table(name: str) -> Shapes:
    """Names and shapes of a published part."""
    folder = "networks" if name.endswith("_shapes") else "keys"
    return json.loads((GOLDEN / folder / f"{name}.json").read_text())


def below(prefix: str, part: str, more: Mapping[str, list[int]] | None = None) -> Shapes:
    """The tensors of a part, and what published files hold besides, as they lie in a whole checkpoint."""
    return {prefix + name: shape for name, shape in {**table(part), **(more or {})}.items()}


def schnell() -> Shapes:
    """As dev, but without guidance."""
    return {name: shape for name, shape in table("flux_dev_shapes").items() if not name.startswith("guidance_in.")}


def sd3_whole() -> Shapes:
    """The transformer, all text encoders and the VAE in one file."""
    encoders = "text_encoders.{}.transformer."
    return {
        **below(UNET, "sd3_medium_mmdit"),
        **below(VAE, "vae_16_channels"),
        **below(encoders.format("clip_l"), "clip_l", PROJECTION),
        **below(encoders.format("clip_g"), "clip_g"),
        **below(encoders.format("t5xxl"), "t5xxl"),
    }


CLIP_L, T5, AE = {**table("clip_l"), **PROJECTION}, table("t5xxl"), table("vae_16_channels")
SD_MORE = {"alphas_cumprod": [1000], "model_ema.decay": []}
# family, flag -> tensors of its file, other options
MODELS: dict[str, tuple[str, dict[str, Shapes], dict[str, object]]] = {
    "sd1": (
        "sd",
        {
            "pretrained_model_name_or_path": {
                **below(UNET, "sd1_unet"),
                **below(VAE, "vae_4_channels"),
                **below(TEXT, "clip_l", POSITIONS),
                **SD_MORE,
            }
        },
        {},
    ),
    "sd2": (
        "sd",
        {
            "pretrained_model_name_or_path": {
                **below(UNET, "sd2_unet"),
                **below(VAE, "vae_4_channels"),
                **below(TEXT_V2, "open_clip_h"),
                **SD_MORE,
            }
        },
        {"v2": True},
    ),
    "sdxl": (
        "sdxl",
        {
            "pretrained_model_name_or_path": {
                **below(UNET, "sdxl_unet"),
                **below(VAE, "vae_4_channels"),
                **below(TEXT_1, "clip_l", POSITIONS),
                **below(TEXT_2, "open_clip_bigg"),
            }
        },
        {},
    ),
    "sd3 whole": ("sd3", {"pretrained_model_name_or_path": sd3_whole()}, {}),
    "sd3 files": (
        "sd3",
        {
            "pretrained_model_name_or_path": table("sd3_medium_mmdit"),
            "vae": AE,
            "clip_l": CLIP_L,
            "clip_g": table("clip_g"),
            "t5xxl": T5,
        },
        {},
    ),
    "flux dev": (
        "flux",
        {"pretrained_model_name_or_path": table("flux_dev_shapes"), "clip_l": CLIP_L, "t5xxl": T5, "ae": AE},
        {},
    ),
    "flux schnell": (
        "flux",
        {"pretrained_model_name_or_path": schnell(), "clip_l": table("clip_l"), "t5xxl": T5, "ae": AE},
        {},
    ),
    "chroma": (
        "flux",
        {"pretrained_model_name_or_path": table("chroma_shapes"), "t5xxl": T5, "ae": AE},
        {"model_type": "chroma"},
    ),
}
# tensors that no part of a training needs -> why
UNREAD = {
    r".*\.position_ids": "numbers from 0 to 76, which transformers makes itself",
    r".*\.logit_scale": "of the comparison of texts with images",
    r"cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection).*": "2.x reads the states before these",
    r"(.*\.)?encoder\.embed_tokens\.weight": "the table of shared.weight again",
    r"alphas_cumprod|model_ema\.decay": "of the training that made the file",
}
# those that only some families do not need
UNREAD_BY = {"flux": {r"text_projection\.weight": "the pooled text is not projected"}}


def write_empty(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """A safetensors file with these tensors; what it should hold is a hole that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with open(path, "rb+") as file:
        file.truncate(8 + len(text) + end)


@dataclass
class Loaded:
    """A model on the meta device.

    Attributes:
        variant: read from the headers.
        components: its parts.
        read: flag -> tensors of its file that were asked for.
        stored: own name -> name in the file, of the U-Net.
    """

    variant: Variant
    components: Components
    read: dict[str, set[str]]
    stored: dict[str, str]


def load(family: str, files: Mapping[str, Shapes], more: Mapping[str, object], folder: Path) -> Loaded:
    """What a run with these files has; there is nothing in them to read, so reading is only noted."""
    read: dict[str, set[str]] = {flag: set() for flag in files}

    def noted(self, name):
        read[self.path.stem].add(name)
        return torch.empty(self.shapes[name], dtype=torch.bfloat16, device="meta")

    for flag, shapes in files.items():
        write_empty(folder / f"{flag}.safetensors", shapes)
    paths = {flag: str(folder / f"{flag}.safetensors") for flag in files}
    options, record = make_options(family, "network", {**paths, **more}), load_family(family)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TensorFile, "tensor", noted)
            variant, components = resolve(record.inspect)(options), resolve(record.load)(options, META)
        main = TensorFile(paths["pretrained_model_name_or_path"])
        return Loaded(variant, components, read, unet.unet_tensors(main))
    finally:
        for path in folder.iterdir():  # their size is large in a listing, and in a copy
            path.unlink()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Model -> what a run with its files has; each made once."""
    made: dict[str, Loaded] = {}

    def make(name):
        if name not in made:
            made[name] = load(*MODELS[name], tmp_path_factory.mktemp("published"))
        return made[name]

    return make


def unread(family: str, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in (*UNREAD, *UNREAD_BY.get(family, ())))


def num_elements(shapes: Mapping[str, list[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def num_values(components: Components) -> int:
    """Of parameters, once where two names share one, and of buffers that files hold."""
    found = 0
    for part in (components.denoiser, components.vae, *components.text_encoders):
        if part is not None:
            kept = part.state_dict().keys()
            buffers = [buffer for name, buffer in part.named_buffers() if name in kept]
            found += sum(value.numel() for value in (*part.parameters(), *buffers))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_published_tensor_has_its_place(loaded, name):
    """The loader checks names and shapes of the module that sizes make against what it was given."""
    family, files, _ = MODELS[name]
    found = loaded(name)
    assert {flag: set(shapes) - found.read[flag] for flag, shapes in files.items()} == {
        flag: {tensor for tensor in shapes if unread(family, tensor)} for flag, shapes in files.items()
    }
    used = {f"{flag} {key}": files[flag][key] for flag in files for key in found.read[flag]}
    assert num_values(found.components) == num_elements(used)


# what the model cards and the papers say: heads of attention, layers, widths
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sd1", {"attention_head_dim": 8, "cross_attention_dim": 768, "layers_per_block": 2}),
        ("sd2", {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "layers_per_block": 2}),
        ("sdxl", {"attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}),
    ],
)
def test_sizes_that_shapes_do_not_show(loaded, name, config):
    components = loaded(name).components
    assert {key: components.denoiser.config[key] for key in config} == config
    heads = {"sd1": [12], "sd2": [16], "sdxl": [12, 20]}[name]
    assert [encoder.config.num_attention_heads for encoder in components.text_encoders] == heads
    assert components.text_encoders[0].config.num_hidden_layers == {"sd2": 23}.get(name, 12)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sd3 files", {"num_heads": 24, "depth": 24, "patch_size": 2, "pos_embed_size": 192, "qk_norm": False}),
        ("flux dev", {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": (16, 56, 56)}),
        ("flux schnell", {"num_heads": 24, "guidance_embed": False, "vec_in_dim": 768, "mlp_ratio": 4.0}),
        ("chroma", {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "vec_in_dim": 0}),
    ],
)
def test_sizes_of_transformers(loaded, name, sizes):
    variant, components = loaded(name).variant, loaded(name).components
    assert {key: getattr(variant.config["params"], key) for key in sizes} == sizes
    t5 = components.text_encoders[-1].config
    assert (t5.num_heads, t5.d_kv, t5.num_layers, t5.d_ff) == (64, 64, 24, 10240)
    assert variant.name == {"sd3 files": "medium", "flux dev": "dev", "flux schnell": "schnell"}.get(name, name)


def test_names_of_the_u_net_are_the_published_ones_both_ways(loaded):
    """The names that adapters are made of come from the module's tree, those of the file from a table."""
    found = loaded("sdxl")
    back = published_state_names(found.components.denoiser, "sgm")
    assert {name: UNET + theirs for name, theirs in back.items()} == found.stored


@pytest.mark.parametrize(
    ("name", "flag", "tensor"),
    [
        ("sd1", "pretrained_model_name_or_path", f"{UNET}output_blocks.11.1.proj_out.bias"),
        ("sdxl", "pretrained_model_name_or_path", f"{TEXT_2}transformer.resblocks.31.ln_2.bias"),
        ("flux dev", "pretrained_model_name_or_path", "single_blocks.37.norm.key_norm.scale"),
        ("chroma", "t5xxl", "encoder.block.23.layer.1.DenseReluDense.wo.weight"),
        ("sd3 files", "vae", "decoder.up.0.block.2.conv2.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, flag, tensor):
    family, files, more = MODELS[name]
    shapes = {key: shape for key, shape in files[flag].items() if key != tensor}
    assert len(shapes) == len(files[flag]) - 1
    with pytest.raises(CheckpointError, match="1 missing: "):
        load(family, {**files, flag: shapes}, more, tmp_path)
