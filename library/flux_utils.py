"""Load FLUX.1 and Chroma from their published files: transformer, autoencoder, CLIP-L (FLUX.1), T5-XXL."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from library.base.errors import CheckpointError, Problem, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.chroma_models import Chroma
from library.flux_models import Flux, FluxParams
from library.modules.clip import load_clip_text
from library.modules.components import Components, Need, Variant
from library.modules.layer_names import LayerRule
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.published_view import published_view
from library.modules.t5 import load_t5_encoder
from library.modules.vae import load_vae
from library.options.schema import OptionSet

_PREFIX = "model.diffusion_model."
_APPROXIMATOR = "distilled_guidance_layer."
_POOLED = "vector_in.in_layer.weight"
_QUERY_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_STREAMS = {"img": ("", ("to_q", "to_k", "to_v"), "to_out.0"), "txt": ("_context", _ADDED, "to_add_out")}


def with_mlp(in_features: int, out_features: int) -> tuple[int, ...]:
    """Query, key and value rows as many as inputs, then those of an MLP."""
    return (in_features,) * 3 + (out_features - 3 * in_features,)


def _layer_rules() -> Iterator[LayerRule]:
    top = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        **{
            f"{ours}.{side}_layer": f"time_text_embed.{theirs}.linear_{number}"
            for ours, theirs in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for side, number in (("in", 1), ("out", 2))
        },
    }
    for ours, theirs in top.items():
        yield LayerRule(pattern=re.escape(ours), names=(theirs,))
    yield LayerRule(pattern=r"final_layer\.adaLN_modulation\.1", names=("norm_out.linear",), swapped=True)
    for stream, (suffix, projections, out) in _STREAMS.items():
        start, block = rf"double_blocks\.(\d+)\.{stream}", r"transformer_blocks.\1"
        added = "" if stream == "img" else "added_"
        inner = {
            r"_mod\.lin": f"norm1{suffix}.linear",
            r"_attn\.proj": f"attn.{out}",
            r"_attn\.norm\.query_norm": f"attn.norm_{added}q",
            r"_attn\.norm\.key_norm": f"attn.norm_{added}k",
            r"_mlp\.0": f"ff{suffix}.net.0.proj",
            r"_mlp\.2": f"ff{suffix}.net.2",
        }
        for ours, theirs in inner.items():
            yield LayerRule(pattern=start + ours, names=(f"{block}.{theirs}",))
        yield LayerRule(pattern=start + r"_attn\.qkv", names=tuple(f"{block}.attn.{name}" for name in projections))
    start, block = r"single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
    inner = {
        r"modulation\.lin": "norm.linear",
        "linear2": "proj_out",
        r"norm\.query_norm": "attn.norm_q",
        r"norm\.key_norm": "attn.norm_k",
    }
    for ours, theirs in inner.items():
        yield LayerRule(pattern=start + ours, names=(block + theirs,))
    parts = "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"
    yield LayerRule(pattern=start + "linear1", names=tuple(block + part for part in parts), parts=with_mlp)
    yield LayerRule(
        pattern=r"distilled_guidance_layer\.layers\.(\d+)\.in_layer",
        names=(r"distilled_guidance_layer.layers.\1.linear_1",),
    )
    yield LayerRule(
        pattern=r"distilled_guidance_layer\.layers\.(\d+)\.out_layer",
        names=(r"distilled_guidance_layer.layers.\1.linear_2",),
    )
    yield LayerRule(pattern=r"(distilled_guidance_layer\.(?:norms\.\d+|in_proj|out_proj))", names=(r"\1",))


DIFFUSERS_LAYERS = tuple(_layer_rules())
# what the files of the other parts would be mistaken for, by a name that only they have
_FOREIGN = {
    "transformer_blocks.0.attn.add_k_proj.bias": "is in the diffusers layout; the published single file is needed",
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
            "pooled_projection_dim": shapes[_POOLED][1] if _POOLED in shapes else 0,  # Chroma has none
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


def is_chroma(file: TensorFile, prefix: str) -> bool:
    """Whether the transformer is Chroma's."""
    return f"{prefix}{_APPROXIMATOR}in_proj.weight" in file


def _check_kind(file: TensorFile, prefix: str, options: OptionSet) -> None:
    """The file is what `--model_type` says."""
    asked = options.value("model_type") == "chroma"
    if is_chroma(file, prefix) and not asked:
        raise CheckpointError(str(file.path), message="is a Chroma checkpoint; add --model_type chroma")
    if asked and not is_chroma(file, prefix):
        raise CheckpointError(str(file.path), message="is a FLUX.1 checkpoint; leave --model_type chroma out")


def _approximator_sizes(file: TensorFile, prefix: str) -> tuple[int, int, int]:
    """Input size, hidden size and depth of the network that makes Chroma's modulation."""
    hidden, in_size = file.shapes[f"{prefix}{_APPROXIMATOR}in_proj.weight"]
    return in_size, hidden, highest_index(file.names, rf"{re.escape(prefix + _APPROXIMATOR)}layers\.(\d+)\.")


def _variant(file: TensorFile, prefix: str) -> Variant:
    params = flux_params(file, prefix)
    config = {"params": params}
    if is_chroma(file, prefix):
        return Variant(name="chroma", base_model_version="chroma", config=config)
    return Variant(name="dev" if params.guidance_embed else "schnell", base_model_version="flux1", config=config)


def load_transformer(file: TensorFile, prefix: str, need: Need) -> Any:
    """The transformer with the file's weights."""
    params = flux_params(file, prefix)
    chroma = is_chroma(file, prefix)
    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    return load_module(
        lambda: Chroma(params, _approximator_sizes(file, prefix)) if chroma else Flux(params),
        readers(file, names),
        path=file.path,
        part="Chroma transformer" if chroma else "FLUX.1 transformer",
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


def _parts(options: OptionSet) -> tuple[str, ...]:
    """Flags of the files besides the transformer's; Chroma reads its captions with T5 alone."""
    return ("t5xxl", "ae") if options.value("model_type") == "chroma" else ("clip_l", "t5xxl", "ae")


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    _check_kind(file, prefix, options)
    opened = _required_files(options, _parts(options))
    marks = {
        "clip_l": ("encoder.layers.0.mlp.fc1.weight", "holds no CLIP text encoder"),
        "t5xxl": ("encoder.block.0.layer.0.SelfAttention.q.weight", "holds no T5 encoder"),
        "ae": ("encoder.conv_in.weight", "holds no autoencoder"),
    }
    for flag, (mark, reason) in marks.items():
        if flag in opened and not any(name.endswith(mark) for name in opened[flag].names):
            raise CheckpointError(f"--{flag}", options.value(flag), f"{reason} (no tensor {mark}); name another file")
    sizes = {
        "transformer": file.num_parameters(prefix),
        **({"CLIP-L": opened["clip_l"].num_parameters()} if "clip_l" in opened else {}),
        "T5": opened["t5xxl"].num_parameters("encoder.") + opened["t5xxl"].num_parameters("shared."),
        "VAE": opened["ae"].num_parameters(),
    }
    return replace(_variant(file, prefix), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or a text encoder is another one."""
    files = _required_files(options, _parts(options))
    text = "".join(files[name].identity() for name in files if name != "ae")
    return {"vae": files["ae"].identity(), "text": text}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    _check_kind(file, prefix, options)
    wanted = [name for name in _parts(options) if (need.vae if name == "ae" else need.text_encoders)]
    files = _required_files(options, wanted)
    clip = load_clip_text(files["clip_l"], "", need=need, part="CLIP-L text encoder") if "clip_l" in files else None
    t5 = load_t5_encoder(files["t5xxl"], need=need) if "t5xxl" in files else None
    transformer = load_transformer(file, prefix, need) if need.denoiser else None
    return Components(
        denoiser=transformer,
        vae=load_vae(files["ae"], "", dtype=need.vae_dtype, device=need.device) if need.vae else None,
        text_encoders=[clip, t5],
        variant=_variant(file, prefix),
        source=file.path,
        published_denoiser=transformer,
        published_text_encoders=[None if clip is None else published_view(clip, "clip"), t5],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata; FLUX files name no prediction type."""
    flux = {"implementation": "https://github.com/black-forest-labs/flux", "resolution": "1024x1024"}
    if variant.name == "chroma":
        return {**flux, "architecture": "chroma", "implementation": "https://huggingface.co/lodestones/Chroma"}
    return {**flux, "architecture": f"flux-1-{variant.name}"}
