"""Load Stable Diffusion 3 and 3.5: one file, or the transformer's and one for each other part."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from library.base.errors import CheckpointError, Problem, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.clip import load_projected_clip_text
from library.modules.components import Components, Need, Variant
from library.modules.layer_names import LayerRule
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.published_view import published_view
from library.modules.t5 import load_t5_encoder
from library.modules.vae import PREFIX as VAE
from library.modules.vae import load_vae, own_vae
from library.options.schema import OptionSet
from library.sd3_models import MMDiT, MMDiTParams

_PREFIX = "model.diffusion_model."
_MARK = "joint_blocks.0.x_block.attn.qkv.weight"
_HEAD_SIZE = 64  # in every published model; visible only where queries and keys are normalised
_CLIP_MARK = "text_model.embeddings.token_embedding.weight"
_T5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
# flag -> (title, a tensor that the part has)
_ENCODERS = {"clip_l": ("CLIP-L", _CLIP_MARK), "clip_g": ("CLIP-G", _CLIP_MARK), "t5xxl": ("T5-XXL", _T5_MARK)}
_FOREIGN = {
    "transformer_blocks.0.attn.add_k_proj.weight": "is in the diffusers layout; the published single file is needed",
    "double_blocks.0.img_attn.qkv.weight": "is a FLUX.1 or Chroma transformer; use flux_train_network.py",
    f"{_PREFIX}double_blocks.0.img_attn.qkv.weight": "is a FLUX.1 or Chroma checkpoint; use flux_train_network.py",
    f"{_PREFIX}label_emb.0.0.weight": "is an SDXL checkpoint; use sdxl_train_network.py",
    f"{_PREFIX}input_blocks.0.0.weight": "is a Stable Diffusion 1.x or 2.x checkpoint; use train_network.py",
    _CLIP_MARK: "is a CLIP text encoder, for --clip_l or --clip_g; name the model",
    "shared.weight": "is a T5 encoder, for --t5xxl; name the model",
    "encoder.conv_in.weight": "is a VAE, for --vae; name the model",
}


def open_checkpoint(path: str) -> tuple[TensorFile, str]:
    """The model's file and the prefix of its transformer.

    Raises:
        CheckpointError: missing file or another model.
    """
    file = open_model_file("--pretrained_model_name_or_path", path)
    for prefix in (_PREFIX, ""):
        if prefix + _MARK in file:
            return file, prefix
    for name, reason in _FOREIGN.items():
        if name in file:
            raise CheckpointError(path, message=reason)
    message = f"holds no Stable Diffusion 3 transformer (no tensor {_PREFIX}{_MARK}); name another file"
    raise CheckpointError(path, message=message)


def mmdit_params(file: TensorFile, prefix: str) -> MMDiTParams:
    """Sizes of the transformer from tensor shapes; `config` in the file's metadata may set the heads."""
    bare = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    shapes = KnownShapes(bare, file.path)
    hidden, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shapes[norm][0] if norm in shapes else _HEAD_SIZE
    depth = highest_index(shapes, r"joint_blocks\.(\d+)\.")
    config = merge_config(
        {"num_attention_heads": hidden // head, "num_layers": depth, "patch_size": patch, "in_channels": in_channels},
        file,
        fixed=("num_layers", "patch_size", "in_channels"),
    )
    return MMDiTParams(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        patch_size=patch,
        hidden_size=hidden,
        num_heads=config["num_attention_heads"],
        depth=depth,
        mlp_size=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
        context_size=shapes["context_embedder.weight"][1],
        pooled_size=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_size=round(shapes["pos_embed"][1] ** 0.5),
        qk_norm=norm in shapes,
        dual_blocks=tuple(
            index for index in range(depth) if f"joint_blocks.{index}.x_block.attn2.qkv.weight" in shapes
        ),
    )


def load_transformer(file: TensorFile, prefix: str, need: Need) -> Any:
    """The transformer with the file's weights."""
    params = mmdit_params(file, prefix)
    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    if not prefix:
        names = {name: name for name in names if not name.startswith((VAE, "text_encoders."))}
    return load_module(
        lambda: MMDiT(params),
        readers(file, names),
        path=file.path,
        part="Stable Diffusion 3 transformer",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _embedded_prefix(file: TensorFile, name: str, mark: str) -> str | None:
    """Where a text encoder lies in the model's file."""
    for prefix in (f"text_encoders.{name}.transformer.", f"text_encoders.{name}."):
        if prefix + mark in file:
            return prefix
    return None


def find_encoders(options: OptionSet, file: TensorFile) -> dict[str, tuple[TensorFile, str]]:
    """Flag -> (file, prefix) of every text encoder: of its flag, else in the model's file. T5 may be missing.

    Raises:
        CheckpointError: a flag's file holds another part.
        UserError: a CLIP encoder is nowhere.
    """
    found: dict[str, tuple[TensorFile, str]] = {}
    problems = []
    for name, (title, mark) in _ENCODERS.items():
        path = options.value(name)
        if path:
            own = open_model_file(f"--{name}", path)
            if mark not in own:
                message = f"holds no {title} encoder (no tensor {mark}); name another file"
                raise CheckpointError(f"--{name}", path, message)
            found[name] = own, ""
        elif (prefix := _embedded_prefix(file, name, mark)) is not None:
            found[name] = file, prefix
        elif name != "t5xxl":
            problems.append(Problem(f"--{name}", f"is needed: the model's file holds no {title} text encoder"))
    raise_problems(problems)
    return found


def _find_vae(options: OptionSet, file: TensorFile) -> tuple[TensorFile, str]:
    own = own_vae(options.value("vae"))
    if own is None and f"{VAE}encoder.conv_in.weight" not in file:
        raise CheckpointError("--vae", message="is needed: the model's file holds no VAE")
    return own or (file, VAE)


def _variant(file: TensorFile, prefix: str, encoders: Mapping[str, tuple[TensorFile, str]]) -> Variant:
    params = mmdit_params(file, prefix)
    name = "medium" if not params.qk_norm else ("5-medium" if params.dual_blocks else "5-large")
    clip, start = encoders["clip_l"]
    width = clip.shapes[start + _CLIP_MARK][1]
    projection = clip.shapes.get(f"{start}text_projection.weight", (width,))
    config = {"params": params, "has_t5": "t5xxl" in encoders, "clip_l_sizes": (width, projection[0])}
    return Variant(name=name, base_model_version=name, config=config)


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
        UserError: a part is nowhere.
    """
    file, prefix = open_checkpoint(options.value("pretrained_model_name_or_path"))
    encoders = find_encoders(options, file)
    vae, vae_prefix = _find_vae(options, file)
    sizes = {
        "transformer": sum(
            file.num_parameters(f"{prefix}{part}")
            for part in ("joint_blocks.", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.")
        ),
        **{_ENCODERS[name][0]: own.num_parameters(start) for name, (own, start) in encoders.items()},
        "VAE": vae.num_parameters(vae_prefix),
    }
    return replace(_variant(file, prefix, encoders), num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or a text encoder is another one."""
    file, _ = open_checkpoint(options.value("pretrained_model_name_or_path"))
    vae, prefix = _find_vae(options, file)
    text = "".join(own.identity(start) for own, start in find_encoders(options, file).values())
    return {"vae": vae.identity(prefix), "text": text}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file, prefix = open_checkpoint(options.value("pretrained_model_name_or_path"))
    places = find_encoders(options, file)
    loaders: dict[str, Callable[..., Any]] = {
        "clip_l": lambda own, start: load_projected_clip_text(own, start, need=need, part="CLIP-L text encoder"),
        "clip_g": lambda own, start: load_projected_clip_text(
            own, start, need=need, part="CLIP-G text encoder", activation="gelu"
        ),
        "t5xxl": lambda own, start: load_t5_encoder(own, need=need, prefix=start),
    }
    encoders = [
        load(*places[name]) if need.text_encoders and name in places else None for name, load in loaders.items()
    ]
    vae = None
    if need.vae:
        vae_file, vae_prefix = _find_vae(options, file)
        vae = load_vae(vae_file, vae_prefix, dtype=need.vae_dtype, device=need.device)
    denoiser = load_transformer(file, prefix, need) if need.denoiser else None
    return Components(
        denoiser=denoiser,
        vae=vae,
        text_encoders=encoders,
        variant=_variant(file, prefix, places),
        source=file.path,
        published_denoiser=denoiser,
        published_text_encoders=[None if one is None else published_view(one, "clip") for one in encoders[:2]]
        + [encoders[2]],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata."""
    return {
        "architecture": f"stable-diffusion-3-{variant.name}",
        "implementation": "diffusers",
        "resolution": "1024x1024",
        "prediction_type": "epsilon",  # what files of this family say, though the model predicts the velocity
    }


_ATTENTION = {
    "x_block.attn": ("attn", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
    "x_block.attn2": ("attn2", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
    "context_block.attn": (
        "attn",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        ("norm_added_q", "norm_added_k"),
    ),
}


def diffusers_layers(variant: Variant) -> tuple[LayerRule, ...]:
    """Names of the transformer's layers in diffusers; the last block's text modulation is exchanged."""
    last = variant.config["params"].depth - 1
    rules = [
        LayerRule(pattern=re.escape(ours), names=(theirs,))
        for ours, theirs in {
            "x_embedder.proj": "pos_embed.proj",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "context_embedder": "context_embedder",
            "final_layer.linear": "proj_out",
        }.items()
    ]
    rules.append(LayerRule(pattern=r"final_layer\.adaLN_modulation\.1", names=("norm_out.linear",), swapped=True))
    start, block = r"joint_blocks\.(\d+)\.", r"transformer_blocks.\1."
    rules.append(
        LayerRule(
            pattern=rf"joint_blocks\.({last})\.context_block\.adaLN_modulation\.1",
            names=(block + "norm1_context.linear",),
            swapped=True,
        )
    )
    for ours, theirs in {
        r"x_block\.mlp\.fc1": "ff.net.0.proj",
        r"x_block\.mlp\.fc2": "ff.net.2",
        r"x_block\.adaLN_modulation\.1": "norm1.linear",
        r"context_block\.mlp\.fc1": "ff_context.net.0.proj",
        r"context_block\.mlp\.fc2": "ff_context.net.2",
        r"context_block\.adaLN_modulation\.1": "norm1_context.linear",
    }.items():
        rules.append(LayerRule(pattern=start + ours, names=(block + theirs,)))
    for stream, (name, projections, out, norms) in _ATTENTION.items():
        own, theirs = start + re.escape(stream) + r"\.", f"{block}{name}."
        rules.append(LayerRule(pattern=own + "qkv", names=tuple(theirs + one for one in projections)))
        rules.append(LayerRule(pattern=own + "proj", names=(theirs + out,)))
        rules += [LayerRule(pattern=own + f"ln_{letter}", names=(theirs + one,)) for letter, one in zip("qk", norms)]
    return tuple(rules)
