"""Load HunyuanImage 2.1 from its published files: transformer, VAE, Qwen2.5-VL, byT5."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from library.base.errors import CheckpointError, Problem, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.hunyuan_image_models import HunyuanImage, HunyuanImageParams
from library.hunyuan_image_vae import MARK as VAE_MARK
from library.hunyuan_image_vae import load_vae
from library.modules.components import Components, Need, Variant
from library.modules.layer_names import LayerRule
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.qwen25_vl import MARK as TEXT_MARK
from library.modules.qwen25_vl import load_qwen25_vl_text, qwen25_vl_names
from library.modules.shards import open_sharded
from library.modules.t5 import load_t5_encoder
from library.options.schema import OptionSet

_PREFIX = "model.diffusion_model."
_QUERY_NORM = "double_blocks.0.img_attn_q_norm.weight"
_BYT5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
_PARTS = {"text_encoder": "the Qwen2.5-VL text encoder", "byt5": "the byT5 text encoder", "vae": "the VAE"}
_FOREIGN = {
    "double_blocks.0.img_attn.norm.query_norm.scale": "is a FLUX.1 or Chroma transformer; use flux_train_network.py",
    "transformer_blocks.0.attn.add_k_proj.weight": "is in the diffusers layout; the published single file is needed",
    "guidance_in.mlp.0.weight": "is the distilled model; the base model is needed",
    "time_r_in.mlp.0.weight": "is the model for few steps; the base model is needed",
    "shared.weight": "is a T5 encoder, for --byt5; name the transformer",
    f"model.{TEXT_MARK}": "is a Qwen2.5-VL text encoder, for --text_encoder; name the transformer",
    VAE_MARK: "is a VAE, for --vae; name the transformer",
}


def open_transformer(path: str) -> tuple[TensorFile, str]:
    """The transformer's file and the prefix of its tensors.

    Raises:
        CheckpointError: missing file or another model.
    """
    file = open_sharded("--pretrained_model_name_or_path", path)
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in file.names) else ""
    for name, reason in _FOREIGN.items():
        if prefix + name in file:
            raise CheckpointError(path, message=reason)
    if prefix + _QUERY_NORM not in file:
        message = f"holds no HunyuanImage transformer (no tensor {_QUERY_NORM}); name the published single file"
        raise CheckpointError(path, message=message)
    return file, prefix


def hunyuan_image_params(file: TensorFile, prefix: str) -> HunyuanImageParams:
    """Sizes of the transformer from tensor shapes; `config` in the file's metadata may set the rotary axes."""
    bare = {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    shapes = KnownShapes(bare, file.path)
    hidden, in_channels = shapes["img_in.proj.weight"][:2]
    head = shapes[_QUERY_NORM][0]
    config = merge_config({"rope_axes_dim": [head // 2, head // 2]}, file, fixed=())
    return HunyuanImageParams(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        hidden_size=hidden,
        num_heads=hidden // head,
        mlp_size=shapes["double_blocks.0.img_mlp.fc1.weight"][0],
        depth=highest_index(shapes, r"double_blocks\.(\d+)\."),
        single_depth=highest_index(shapes, r"single_blocks\.(\d+)\."),
        refiner_depth=highest_index(shapes, r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
        text_size=shapes["txt_in.input_embedder.weight"][1],
        glyph_size=shapes["byt5_in.fc1.weight"][1],
        glyph_hidden=(shapes["byt5_in.fc1.weight"][0], shapes["byt5_in.fc2.weight"][0]),
        axes_dim=tuple(config["rope_axes_dim"]),
    )


def load_transformer(file: TensorFile, prefix: str, need: Need) -> Any:
    """The transformer with the file's weights."""
    params = hunyuan_image_params(file, prefix)
    names = {name.removeprefix(prefix): name for name in file.names if name.startswith(prefix)}
    return load_module(
        lambda: HunyuanImage(params),
        readers(file, names),
        path=file.path,
        part="HunyuanImage transformer",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _open_parts(options: OptionSet) -> dict[str, TensorFile]:
    """Opened files of VAE and text encoders; all that are missing are reported together.

    Raises:
        CheckpointError: a file holds another part.
    """
    raise_problems(
        Problem(f"--{name}", f"is needed: the file of {title}")
        for name, title in _PARTS.items()
        if not options.value(name)
    )
    opened = {
        name: (open_sharded if name == "text_encoder" else open_model_file)(f"--{name}", options.value(name))
        for name in _PARTS
    }
    marks = {"byt5": _BYT5_MARK, "vae": VAE_MARK}
    for name, file in opened.items():
        found = bool(qwen25_vl_names(file)) if name == "text_encoder" else marks[name] in file
        if not found:
            mark = marks.get(name, f"model.{TEXT_MARK}")
            message = f"does not hold {_PARTS[name]} (no tensor {mark}); name another file"
            raise CheckpointError(f"--{name}", options.value(name), message)
    return opened


def _variant(file: TensorFile, prefix: str) -> Variant:
    params = hunyuan_image_params(file, prefix)
    return Variant(name="2.1", base_model_version="hunyuan-image-2.1", config={"params": params})


def _check_width(flag: str, path: str, width: int, read: int) -> None:
    if width != read:
        message = f"has states of width {width}, but this model reads {read}; name the file that belongs to it"
        raise CheckpointError(flag, path, message)


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    parts = _open_parts(options)
    variant = _variant(file, prefix)
    params, text, byt5 = variant.config["params"], parts["text_encoder"], parts["byt5"]
    language = KnownShapes({ours: text.shapes[name] for ours, name in qwen25_vl_names(text).items()}, text.path)
    _check_width("--text_encoder", options.value("text_encoder"), language["embed_tokens.weight"][1], params.text_size)
    _check_width("--byt5", options.value("byt5"), byt5.shapes[_BYT5_MARK][1], params.glyph_size)
    sizes = {
        "transformer": file.num_parameters(prefix),
        "Qwen2.5-VL": sum(math.prod(shape) for shape in language.values()),
        "byT5": byt5.num_parameters(),
        "VAE": parts["vae"].num_parameters(),
    }
    return replace(variant, num_parameters=sizes)


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the VAE or a text encoder is another one."""
    parts = _open_parts(options)
    return {"vae": parts["vae"].identity(), "text": parts["text_encoder"].identity() + parts["byt5"].identity()}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file, prefix = open_transformer(options.value("pretrained_model_name_or_path"))
    parts = _open_parts(options)
    encoders: list[Any] = [None, None]
    if need.text_encoders:
        near = replace(need, device=torch.device("cpu")) if options.value("text_encoder_cpu") else need
        # of these encoders only the large one may be kept in 8 bits
        encoders = [
            load_qwen25_vl_text(parts["text_encoder"], need=near),
            load_t5_encoder(parts["byt5"], need=replace(near, prepare_text_encoder=None)),
        ]
    denoiser = load_transformer(file, prefix, need) if need.denoiser else None
    return Components(
        denoiser=denoiser,
        vae=load_vae(parts["vae"], need, options.value("vae_chunk_size")) if need.vae else None,
        text_encoders=encoders,
        variant=_variant(file, prefix),
        source=file.path,
        published_denoiser=denoiser,
        published_text_encoders=list(encoders),
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata."""
    del variant
    return {
        "architecture": "hunyuan-image-2.1",
        "implementation": "diffusers",
        "resolution": "2048x2048",
        "prediction_type": "epsilon",  # what files of this family say, though the model predicts the velocity
    }


def with_mlp(in_features: int, out_features: int) -> tuple[int, ...]:
    """Query, key and value rows as many as inputs, then those of an MLP."""
    return (in_features,) * 3 + (out_features - 3 * in_features,)


def _layer_rules() -> Iterator[LayerRule]:
    refiner = "context_embedder.token_refiner.refiner_blocks"
    for ours, theirs in {
        "img_in.proj": "x_embedder.proj",
        "byt5_in.layernorm": "context_embedder_2.norm",
        **{f"byt5_in.fc{number}": f"context_embedder_2.linear_{number}" for number in (1, 2, 3)},
        "txt_in.input_embedder": "context_embedder.proj_in",
        **{
            f"txt_in.{ours}.{layer}": f"context_embedder.time_text_embed.{theirs}.linear_{number}"
            for ours, theirs, layers in (
                ("t_embedder", "timestep_embedder", ("mlp.0", "mlp.2")),
                ("c_embedder", "text_embedder", ("linear_1", "linear_2")),
            )
            for number, layer in enumerate(layers, 1)
        },
        "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }.items():
        yield LayerRule(pattern=re.escape(ours), names=(theirs,))
    yield LayerRule(pattern=r"final_layer\.adaLN_modulation\.1", names=("norm_out.linear",), swapped=True)
    start, block = r"txt_in\.individual_token_refiner\.blocks\.(\d+)\.", rf"{refiner}.\1."
    yield _fused(start + "self_attn_qkv", block, ("to_q", "to_k", "to_v"))
    for ours, theirs in {
        "norm1": "norm1",
        "norm2": "norm2",
        "self_attn_proj": "attn.to_out.0",
        r"mlp\.fc1": "ff.net.0.proj",
        r"mlp\.fc2": "ff.net.2",
        r"adaLN_modulation\.1": "norm_out.linear",
    }.items():
        yield LayerRule(pattern=start + ours, names=(block + theirs,))
    yield from _stream_rules("img", "", "", ("to_q", "to_k", "to_v"), "to_out.0")
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    yield from _stream_rules("txt", "_context", "added_", added, "to_add_out")
    start, block = r"single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
    for ours, theirs in {
        r"modulation\.linear": "norm.linear",
        "linear2": "proj_out",
        "q_norm": "attn.norm_q",
        "k_norm": "attn.norm_k",
    }.items():
        yield LayerRule(pattern=start + ours, names=(block + theirs,))
    names = tuple(block + part for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    yield LayerRule(pattern=start + "linear1", names=names, parts=with_mlp)


def _fused(pattern: str, block: str, parts: tuple[str, ...]) -> LayerRule:
    return LayerRule(pattern=pattern, names=tuple(f"{block}attn.{part}" for part in parts))


def _stream_rules(stream: str, suffix: str, added: str, parts: tuple[str, ...], out: str) -> Iterator[LayerRule]:
    """Of one stream of the double blocks."""
    start, block = rf"double_blocks\.(\d+)\.{stream}_", r"transformer_blocks.\1."
    yield _fused(start + "attn_qkv", block, parts)
    for ours, theirs in {
        r"mod\.linear": f"norm1{suffix}.linear",
        "attn_proj": f"attn.{out}",
        "attn_q_norm": f"attn.norm_{added}q",
        "attn_k_norm": f"attn.norm_{added}k",
        r"mlp\.fc1": f"ff{suffix}.net.0.proj",
        r"mlp\.fc2": f"ff{suffix}.net.2",
    }.items():
        yield LayerRule(pattern=start + ours, names=(block + theirs,))


DIFFUSERS_LAYERS = tuple(_layer_rules())


def _comfy_rules() -> Iterator[LayerRule]:
    for stream in ("img", "txt"):
        start, block = rf"double_blocks\.(\d+)\.{stream}_", rf"double_blocks.\1.{stream}_"
        yield LayerRule(pattern=start + r"attn_(qkv|proj)", names=(block + r"attn.\2",))
        yield LayerRule(pattern=start + r"mlp\.fc1", names=(block + "mlp.0",))
        yield LayerRule(pattern=start + r"mlp\.fc2", names=(block + "mlp.2",))
        yield LayerRule(pattern=start + r"mod\.linear", names=(block + "mod.lin",))
    yield LayerRule(pattern=r"single_blocks\.(\d+)\.modulation\.linear", names=(r"single_blocks.\1.modulation.lin",))


COMFY_LAYERS = tuple(_comfy_rules())
