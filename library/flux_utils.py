"""Load FLUX.1 from its published files: transformer, autoencoder, CLIP-L, T5-XXL."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from library.base.errors import CheckpointError, Problem, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.flux_models import Flux, FluxParams
from library.modules.clip import load_clip_text
from library.modules.components import Components, Need, Variant
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.published_view import published_view
from library.modules.t5 import load_t5_encoder
from library.modules.vae import load_vae
from library.options.schema import OptionSet

_PREFIX = "model.diffusion_model."
_QUERY_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"
# what the files of the other parts would be mistaken for, by a name that only they have
_FOREIGN = {
    "transformer_blocks.0.attn.add_k_proj.bias": "is in the diffusers layout; the published single file is needed",
    "distilled_guidance_layer.in_proj.weight": "is a Chroma checkpoint; this version trains FLUX.1 dev and schnell",
    "encoder.conv_in.weight": "is an autoencoder, for --ae; name the transformer",
    "text_model.embeddings.token_embedding.weight": "is a CLIP text encoder, for --clip_l; name the transformer",
    "shared.weight": "is a T5 encoder, for --t5xxl; name the transformer",
}


def open_transformer(path: str) -> tuple[TensorFile, str]:
    """The transformer's file and the prefix of its tensors.

    Raises:
        CheckpointError: missing file or another model.
    """
    file = open_model_file("--pretrained_model_name_or_path", path)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in file.names) else ""
    for name, reason in _FOREIGN.items():
        if prefix + name in file:
            raise CheckpointError(path, message=reason)
    if prefix + _QUERY_NORM not in file:
        raise CheckpointError(
            path, message=f"holds no FLUX.1 transformer (no tensor {_QUERY_NORM}); name the published single file"
        )
    return file, prefix


def rope_axes(head_size: int) -> tuple[int, int, int]:
    """Rotary channels of (index, row, column): the published 16, 56, 56 scaled with the head size, rounded to even."""
    side = 2 * round(head_size * 56 / 128 / 2)
    return head_size - 2 * side, side, side


def flux_params(file: TensorFile, prefix: str) -> FluxParams:
    """Sizes of the transformer from tensor shapes; `config` in the file's metadata may set heads and rotary axes."""
    bare = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    shapes = KnownShapes(bare, file.path)
    hidden, in_channels = shapes["img_in.weight"]
    head_size = shapes[_QUERY_NORM][0]
    config = merge_config(
        {
            "in_channels": in_channels,
            "num_layers": highest_index(shapes, r"double_blocks\.(\d+)\."),
            "num_single_layers": highest_index(shapes, r"single_blocks\.(\d+)\."),
            "attention_head_dim": head_size,
            "num_attention_heads": hidden // head_size,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
            "axes_dims_rope": list(rope_axes(head_size)),
        },
        file,
        fixed=("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "guidance_embeds"),
    )
    return FluxParams(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        vec_in_dim=config["pooled_projection_dim"],
        context_in_dim=config["joint_attention_dim"],
        hidden_size=hidden,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        depth_single_blocks=config["num_single_layers"],
        axes_dim=tuple(config["axes_dims_rope"]),
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed=config["guidance_embeds"],
    )


def _variant(params: FluxParams) -> Variant:
    name = "dev" if params.guidance_embed else "schnell"
    return Variant(name=name, base_model_version="flux1", config={"params": params})


def load_transformer(file: TensorFile, prefix: str, need: Need) -> Any:
    """The transformer with the file's weights."""
    params = flux_params(file, prefix)
    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    return load_module(
        lambda: Flux(params),
        readers(file, names),
        path=file.path,
        part="FLUX.1 transformer",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _required_files(options: OptionSet, names: Iterable[str]) -> dict[str, TensorFile]:
    """Opened files of the given flags; all that are missing are reported together."""
    meaning = {"clip_l": "the CLIP-L text encoder", "t5xxl": "the T5-XXL text encoder", "ae": "the autoencoder"}
    names = list(names)
    raise_problems(
        Problem(f"--{name}", f"is needed: the file of {meaning[name]}") for name in names if not options.value(name)
    )
    return {name: open_model_file(f"--{name}", options.value(name)) for name in names}


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    opened = _required_files(options, ("clip_l", "t5xxl", "ae"))
    marks = {
        "clip_l": ("encoder.layers.0.mlp.fc1.weight", "holds no CLIP text encoder"),
        "t5xxl": ("encoder.block.0.layer.0.SelfAttention.q.weight", "holds no T5 encoder"),
        "ae": ("encoder.conv_in.weight", "holds no autoencoder"),
    }
    for flag, (mark, reason) in marks.items():
        if not any(name.endswith(mark) for name in opened[flag].names):
            raise CheckpointError(f"--{flag}", options.value(flag), f"{reason} (no tensor {mark}); name another file")
    sizes = {
        "transformer": file.num_parameters(prefix),
        "CLIP-L": opened["clip_l"].num_parameters(),
        "T5": opened["t5xxl"].num_parameters("encoder.") + opened["t5xxl"].num_parameters("shared."),
        "VAE": opened["ae"].num_parameters(),
    }
    return replace(_variant(flux_params(file, prefix)), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or a text encoder is another one."""
    files = _required_files(options, ("clip_l", "t5xxl", "ae"))
    return {"vae": files["ae"].identity(), "text": files["clip_l"].identity() + files["t5xxl"].identity()}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    wanted = (["clip_l", "t5xxl"] if need.text_encoders else []) + (["ae"] if need.vae else [])
    files = _required_files(options, wanted)
    encoders: list[Any] = [None, None]
    if need.text_encoders:
        encoders = [
            load_clip_text(files["clip_l"], "", need=need, part="CLIP-L text encoder"),
            load_t5_encoder(files["t5xxl"], need=need),
        ]
    transformer = load_transformer(file, prefix, need) if need.denoiser else None
    clip, t5 = encoders
    return Components(
        denoiser=transformer,
        vae=load_vae(files["ae"], "", dtype=need.vae_dtype, device=need.device) if need.vae else None,
        text_encoders=encoders,
        variant=_variant(flux_params(file, prefix)),
        source=file.path,
        published_denoiser=transformer,
        published_text_encoders=[None if clip is None else published_view(clip, "clip"), t5],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata; FLUX files name no prediction type."""
    return {
        "architecture": f"flux-1-{variant.name}",
        "implementation": "https://github.com/black-forest-labs/flux",
        "resolution": "1024x1024",
    }
