"""Load Anima from its published files: transformer with text adapter, Qwen3, Qwen-Image VAE."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from library.anima_models import PATCH, Anima, AnimaParams
from library.base.errors import CheckpointError, Problem, raise_problems
from library.base.safetensors_io import KnownShapes, TensorFile
from library.modules.components import Components, Need, Variant
from library.modules.layer_names import LayerRule
from library.modules.llm_adapter import LLMAdapterParams
from library.modules.loading import highest_index, load_module, merge_config, open_model_file, readers
from library.modules.qwen3 import load_qwen3, open_qwen3
from library.modules.qwen_image_vae import MARKS as VAE_MARKS
from library.modules.qwen_image_vae import file_names, load_qwen_image_vae
from library.modules.shards import open_sharded
from library.options.schema import OptionSet

_PREFIX = "net."
_QUERY_NORM = "blocks.0.self_attn.q_norm.weight"
_ADAPTER = "llm_adapter."
_TOKENS = f"{_ADAPTER}embed.weight"
# buffers of rotary frequencies: they follow from the sizes, and half precision rounds them
_DROPPED = ("pos_embedder.", f"{_ADAPTER}rotary_emb.")
# what other files would be mistaken for, by a name that only they have
_FOREIGN = {
    "transformer_blocks.0.attn1.norm_q.weight": "is in the diffusers layout; the published single file is needed",
    "model.layers.0.self_attn.q_norm.weight": "is a Qwen3 text encoder, for --qwen3; name the transformer",
    **dict.fromkeys(VAE_MARKS, "is an autoencoder, for --vae; name the transformer"),
    "double_blocks.0.img_attn.norm.query_norm.scale": "is a FLUX.1 checkpoint; use flux_train_network.py",
}

DIFFUSERS_LAYERS: tuple[LayerRule, ...] = (
    LayerRule(pattern=r"x_embedder\.proj\.1", names=("patch_embed.proj",)),
    LayerRule(pattern=r"t_embedder\.1\.(linear_[12])", names=(r"time_embed.t_embedder.\1",)),
    LayerRule(pattern=r"final_layer\.adaln_modulation\.([12])", names=(r"norm_out.linear_\1",)),
    LayerRule(pattern=r"final_layer\.linear", names=("proj_out",)),
    *(
        LayerRule(
            pattern=rf"blocks\.(\d+)\.adaln_modulation_{part}\.([12])",
            names=(rf"transformer_blocks.\1.norm{number}.linear_\2",),
        )
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
    ),
    *(
        LayerRule(pattern=rf"blocks\.(\d+)\.{ours}\.{inner}", names=(rf"transformer_blocks.\1.{theirs}.{name}",))
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for inner, name in ((r"([qkv])_proj", r"to_\2"), ("output_proj", "to_out.0"))
    ),
    LayerRule(pattern=r"blocks\.(\d+)\.mlp\.layer1", names=(r"transformer_blocks.\1.ff.net.0.proj",)),
    LayerRule(pattern=r"blocks\.(\d+)\.mlp\.layer2", names=(r"transformer_blocks.\1.ff.net.2",)),
    LayerRule(pattern=r"llm_adapter\.(.*)", names=(r"\1",), component="text_conditioner"),
)


def open_transformer(path: str) -> TensorFile:
    """The transformer's file, or the files that it is cut into.

    Raises:
        CheckpointError: missing file or another model.
    """
    file = open_sharded("--pretrained_model_name_or_path", path)
    names = set(_bare_names(file))
    for name, reason in _FOREIGN.items():
        if name in names:
            raise CheckpointError(path, message=reason)
    if _QUERY_NORM not in names:
        raise CheckpointError(
            path, message=f"holds no Anima transformer (no tensor {_QUERY_NORM}); name the published single file"
        )
    return file


def _bare_names(file: TensorFile) -> dict[str, str]:
    """Our name -> name in the file, without the buffers that are not used."""
    bare = {name.removeprefix(_PREFIX): name for name in file.names}
    return {ours: stored for ours, stored in bare.items() if not ours.startswith(_DROPPED)}


def open_adapter(path: str | None) -> TensorFile | None:
    """The separate file of the text adapter, where one is named.

    Raises:
        CheckpointError: missing file or another model.
    """
    if path is None:
        return None
    file = open_model_file("--llm_adapter_path", path)
    if _TOKENS not in _adapter_names(file):
        message = f"holds no text adapter of Anima (no tensor {_TOKENS}); name another file"
        raise CheckpointError("--llm_adapter_path", path, message)
    return file


def _adapter_names(file: TensorFile) -> dict[str, str]:
    """Our name -> name in the file; a separate file may leave `llm_adapter.` out of its names."""
    bare = {name.removeprefix(_PREFIX): name for name in file.names}
    if not any(name.startswith(_ADAPTER) for name in bare):
        bare = {_ADAPTER + name: stored for name, stored in bare.items()}
    kept = {name: stored for name, stored in bare.items() if name.startswith(_ADAPTER)}
    return {name: stored for name, stored in kept.items() if not name.startswith(_DROPPED)}


def anima_params(file: TensorFile, adapter: TensorFile | None = None) -> AnimaParams:
    """Sizes from tensor shapes; `config` in the file's metadata may set heads and the rotary scale.

    Args:
        file: of the transformer.
        adapter: separate file of the text adapter.

    Raises:
        CheckpointError: no text adapter in either file, or missing tensors.
    """
    shapes = KnownShapes({ours: file.shapes[stored] for ours, stored in _bare_names(file).items()}, file.path)
    if adapter is not None:
        shapes.update({ours: adapter.shapes[stored] for ours, stored in _adapter_names(adapter).items()})
    if _TOKENS not in shapes:
        message = f"holds no text adapter (no tensor {_TOKENS}); name a complete Anima file, or --llm_adapter_path"
        raise CheckpointError(str(file.path), message=message)
    hidden, patch_size = shapes["x_embedder.proj.1.weight"]
    in_channels = patch_size // PATCH**2 - 1
    head_size = shapes[_QUERY_NORM][0]
    side_scale = 4.0 if in_channels == 16 else 3.0
    config = merge_config(
        {
            "in_channels": in_channels,
            "num_layers": highest_index(shapes, r"blocks\.(\d+)\."),
            "attention_head_dim": head_size,
            "num_attention_heads": hidden // head_size,
            "text_embed_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
            "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
            "rope_scale": [1.0, side_scale, side_scale],
        },
        file,
        fixed=("in_channels", "num_layers", "attention_head_dim", "num_attention_heads", "text_embed_dim"),
    )
    return AnimaParams(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // PATCH**2,
        hidden_size=hidden,
        mlp_size=shapes["blocks.0.mlp.layer1.weight"][0],
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        context_dim=config["text_embed_dim"],
        adaln_dim=config["adaln_lora_dim"],
        rope_scale=tuple(config["rope_scale"]),
        adapter=_adapter_params(shapes),
    )


def _adapter_params(shapes: KnownShapes) -> LLMAdapterParams:
    inner, model_dim = shapes[f"{_ADAPTER}blocks.0.self_attn.q_proj.weight"]
    vocab_size, target_dim = shapes[_TOKENS]
    return LLMAdapterParams(
        source_dim=shapes[f"{_ADAPTER}blocks.0.cross_attn.k_proj.weight"][1],
        target_dim=target_dim,
        model_dim=model_dim,
        mlp_dim=shapes[f"{_ADAPTER}blocks.0.mlp.0.weight"][0],
        num_heads=inner // shapes[f"{_ADAPTER}blocks.0.self_attn.q_norm.weight"][0],
        depth=highest_index(shapes, r"llm_adapter\.blocks\.(\d+)\."),
        vocab_size=vocab_size,
    )


def _variant(params: AnimaParams) -> Variant:
    return Variant(name="preview", base_model_version="anima", config={"params": params})


def load_transformer(file: TensorFile, need: Need, adapter: TensorFile | None = None) -> Any:
    """The transformer with the files' weights; a separate adapter takes the place of the one in `file`."""
    params = anima_params(file, adapter)
    names = _bare_names(file)
    tensors = readers(file, names)
    if adapter is not None:
        tensors = {name: reader for name, reader in tensors.items() if not name.startswith(_ADAPTER)}
        tensors |= readers(adapter, _adapter_names(adapter))
    return load_module(
        lambda: Anima(params),
        tensors,
        path=file.path,
        part="Anima transformer",
        dtype=need.dtype,
        device=need.place_of_denoiser,
        prepare=need.prepare_denoiser,
    )


def _required(options: OptionSet, names: Iterable[str]) -> dict[str, TensorFile]:
    """Opened files of the given flags; all that are missing are reported together."""
    meaning = {"qwen3": "the Qwen3 text encoder", "vae": "the Qwen-Image VAE"}
    names = list(names)
    raise_problems(
        Problem(f"--{name}", f"is needed: the file of {meaning[name]}") for name in names if not options.value(name)
    )
    openers = {"qwen3": open_qwen3, "vae": open_model_file}
    return {name: openers[name](f"--{name}", options.value(name)) for name in names}


def inspect(options: OptionSet) -> Variant:
    """Read the headers of every file the run names, before any weights load.

    Raises:
        CheckpointError: a missing, damaged or foreign file.
    """
    file = open_transformer(options.value("pretrained_model_name_or_path"))
    params = anima_params(file, open_adapter(options.value("llm_adapter_path")))
    opened = _required(options, ("qwen3", "vae"))
    file_names(opened["vae"])
    width = opened["qwen3"].shapes[_embedding(opened["qwen3"])][1]
    if width != params.adapter.source_dim:
        message = f"has states of width {width}, but this model's text adapter reads {params.adapter.source_dim}"
        raise CheckpointError("--qwen3", options.value("qwen3"), message + "; Anima needs Qwen3-0.6B (base)")
    sizes = {
        "transformer": sum(_elements(file, name) for name in _bare_names(file).values()),
        "Qwen3": sum(_elements(opened["qwen3"], n) for n in opened["qwen3"].names if not n.startswith("lm_head.")),
        "VAE": opened["vae"].num_parameters(),
    }
    return replace(_variant(params), num_parameters=sizes)


def _embedding(file: TensorFile) -> str:
    return next(name for name in file.names if name.endswith("embed_tokens.weight"))


def _elements(file: TensorFile, name: str) -> int:
    count = 1
    for side in file.shapes[name]:
        count *= side
    return count


def identities(options: OptionSet) -> dict[str, str]:
    """Texts that change when the autoencoder or the text encoder is another one."""
    files = _required(options, ("qwen3", "vae"))
    return {"vae": files["vae"].identity(), "text": files["qwen3"].identity()}


def load_components(options: OptionSet, need: Need) -> Components:
    """The parts of the model that `need` asks for.

    Raises:
        CheckpointError: a file that is missing, damaged, incomplete or of another family.
    """
    file = open_transformer(options.value("pretrained_model_name_or_path"))
    adapter = open_adapter(options.value("llm_adapter_path"))
    wanted = (["qwen3"] if need.text_encoders else []) + (["vae"] if need.vae else [])
    files = _required(options, wanted)
    transformer = load_transformer(file, need, adapter) if need.denoiser else None
    encoder = load_qwen3(files["qwen3"], options.value("qwen3"), need=need) if need.text_encoders else None
    vae = None
    if need.vae:
        vae = load_qwen_image_vae(
            files["vae"],
            dtype=need.vae_dtype,
            device=need.device,
            frames_cached=not options.value("vae_disable_cache"),
            flat=options.value("qwen_image_vae_2d"),
            chunk=options.value("vae_chunk_size"),
        )
    return Components(
        denoiser=transformer,
        vae=vae,
        text_encoders=[encoder],
        variant=_variant(anima_params(file, adapter)),
        source=file.path,
        published_denoiser=transformer,
        published_text_encoders=[encoder],
    )


def model_spec(variant: Variant) -> dict[str, str]:
    """Family entries of the modelspec metadata."""
    del variant
    return {
        "architecture": "anima-preview",
        "implementation": "https://huggingface.co/circlestone-labs/Anima",
        "resolution": "1024x1024",
        "prediction_type": "epsilon",  # not what it predicts, but what all files of Anima adapters say
    }
