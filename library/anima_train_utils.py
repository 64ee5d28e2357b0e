"""Anima: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem
from library.family import ExportPart, Family, InferenceSpec, LatentSpec, Ref, TextSpec
from library.options.attention import DitAttentionOptions
from library.options.checks import text_caching_problems
from library.options.compiling import CompileOptions
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.inference import format_problems
from library.options.memory import VaeMemoryOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.precision import PrecisionOptions
from library.options.ranges import at_least, share
from library.options.schema import OptionSet, option
from library.options.script_inference import NAMES, ScriptInferenceOptions, shared_values

LLLITE_PRESETS = ("self_attn_q", "self_attn_qkv", "self_attn_qkv_cross_q")
LLLITE_LAYERS = ("self_attn_q_pre", "self_attn_kv_pre", "cross_attn_q_pre", "mlp_fc1_pre")


@dataclass(frozen=True, kw_only=True)
class AnimaOptions:
    """Anima: its text encoder, tokenizers and rates of its parts."""

    qwen3: str | None = option(None, help="Qwen3 file or folder")
    t5_tokenizer_path: str | None = option(None, help="folder of the T5 tokenizer; a bundled one when not given")
    qwen3_max_token_length: int = option(512, help="longest caption in Qwen3 tokens")
    t5_max_token_length: int = option(512, help="longest caption in T5 tokens")
    llm_adapter_path: str | None = option(
        None, help="separate file of the text adapter, instead of the one in the model file"
    )
    llm_adapter_lr: float | None = option(None, help="learning rate of the text adapter; 0: not trained")
    self_attn_lr: float | None = option(None, help="learning rate of self-attention; 0: not trained")
    cross_attn_lr: float | None = option(None, help="learning rate of cross-attention; 0: not trained")
    mlp_lr: float | None = option(None, help="learning rate of the MLPs; 0: not trained")
    mod_lr: float | None = option(None, help="learning rate of the modulation; 0: not trained")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1, qwen3_max_token_length=self.qwen3_max_token_length, t5_max_token_length=self.t5_max_token_length
        )
        names = ("llm_adapter_lr", "self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr")
        yield from at_least(0, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class AnimaLLLiteOptions:
    """Anima LLLite: shape of the control modules."""

    lllite_cond_dim: int = option(64, help="width inside the encoder of control images")
    lllite_cond_resblocks: int = option(1, help="residual blocks of that encoder")
    lllite_use_aspp: bool = option(False, help="let that encoder see several scales")
    lllite_mlp_dim: int = option(64, help="width inside the control modules")
    lllite_target_layers: str = option(
        "self_attn_q", help="a preset (self_attn_q, self_attn_qkv, self_attn_qkv_cross_q) or layers separated by commas"
    )
    lllite_dropout: float | None = option(None, help="share of the modules' activations dropped while training")
    lllite_multiplier: float = option(1.0, help="strength of the control modules")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, lllite_cond_dim=self.lllite_cond_dim, lllite_mlp_dim=self.lllite_mlp_dim)
        yield from at_least(0, lllite_cond_resblocks=self.lllite_cond_resblocks)
        yield from share(lllite_dropout=self.lllite_dropout)
        layers = self.lllite_target_layers.split(",")
        if self.lllite_target_layers not in LLLITE_PRESETS and not set(layers) <= set(LLLITE_LAYERS):
            expected = f"one of {', '.join(LLLITE_PRESETS)}, or some of {', '.join(LLLITE_LAYERS)} with commas"
            yield Problem("--lllite_target_layers", f"expected {expected}", self.lllite_target_layers)


@dataclass(frozen=True, kw_only=True)
class AnimaInferenceOptions:
    """Anima: its files, their number formats, and how they compute."""

    dit: str = option(help="transformer file")
    text_encoder: str = option(help="Qwen3 file or folder")
    vae: str = option(help="Qwen-Image VAE file")
    llm_adapter_path: str | None = option(None, help="separate file of the text adapter")
    t5_tokenizer_path: str | None = option(None, help="folder of the T5 tokenizer")
    qwen3_max_token_length: int = option(512, help="longest prompt in Qwen3 tokens")
    t5_max_token_length: int = option(512, help="longest prompt in T5 tokens")
    attn_mode: str = option(
        "torch",
        help="implementation of attention; sdpa is another name of torch",
        choices=("flash", "torch", "sageattn", "xformers", "sdpa"),
    )
    vae_chunk_size: int | None = option(None, help="rows of an image that the VAE handles at a time")
    vae_disable_cache: bool = option(False, help="do not keep the VAE's features between chunks")
    dit_dtype: str | None = option(None, help="number format of the transformer; fp8 keeps its weights in 8 bits")
    text_encoder_dtype: str | None = option(None, help="number format of Qwen3; fp8 keeps its weights in 8 bits")
    vae_dtype: str | None = option(None, help="number format of the VAE")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        lengths = {name: getattr(self, name) for name in ("qwen3_max_token_length", "t5_max_token_length")}
        yield from at_least(1, **lengths, vae_chunk_size=self.vae_chunk_size)
        yield from format_problems(self, "vae_dtype", weights_only=("dit_dtype", "text_encoder_dtype"))


def inference_values(options: OptionSet) -> dict[str, Any]:
    """What flags of the script say under the names of others."""
    own = options[ScriptInferenceOptions]
    return {**shared_values(options), **({"dit_dtype": "fp8"} if own.fp8 or own.fp8_scaled else {})}


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of Anima scripts."""
    network = options.get(NetworkOptions)
    trained = task == "network" and network is not None and not network.network_train_unet_only
    # an empty caption is cached beside the others, so dropping whole captions needs no encoder
    yield from text_caching_problems(options, trains_cached_encoders=trained)
    if options[CompileOptions].compile_fullgraph and options[DitAttentionOptions].split_attn:
        yield Problem("--compile_fullgraph", "cannot be combined with --split_attn")
    precision = options[PrecisionOptions]
    for name in ("fp8_base", "fp8_base_unet"):
        if getattr(precision, name):
            message = "Anima is not trained on 8-bit weights; leave it out: the whole model takes 4 GB in bf16"
            yield Problem(f"--{name}", message)


def missing(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.missing
    """Files without which Anima cannot be trained."""
    if options[AnimaOptions].qwen3 is None:
        yield Problem("--qwen3", "is required: the Qwen3 text encoder, a file or a folder")
    if options[ModelOptions].vae is None:
        yield Problem("--vae", "is required: the Qwen-Image VAE")


FAMILY = Family(
    name="anima",
    title="Anima",
    process="flow",
    tasks=frozenset({"network", "full", "lllite"}),
    available_tasks=frozenset({"network"}),
    option_groups=(
        AnimaOptions,
        DitAttentionOptions,
        VaeMemoryOptions,
        FlowOptions,
        FlowSamplingOptions,
    ),
    task_option_groups={"lllite": (AnimaLLLiteOptions,)},
    hidden=frozenset({"model_prediction_type"}),
    task_hidden={"lllite": frozenset({"network_dim", "network_dropout"})},
    defaults={"discrete_flow_shift": 1.0, "timestep_sampling": "sigmoid"},
    task_defaults={"lllite": {"cond_emb_dim": 32}},
    tracker_names={"network": "network_train", "full": "finetuning", "lllite": "lllite_control_net_train"},
    check=check,
    missing=missing,
    latent=LatentSpec(channels=16, spatial_factor=8, resolution_step=16, cache_suffix="_anima"),
    text=TextSpec(
        cache_suffix="_anima_te",
        arrays={
            "prompt_embeds": "float",
            "attn_mask": "int64",
            "t5_input_ids": "int32",
            "t5_attn_mask": "int32",
            "caption_dropout_rate": "float",
        },
    ),
    default_network="networks.lora_anima",
    inspect=Ref("library.anima_utils:inspect"),
    load=Ref("library.anima_utils:load_components"),
    identities=Ref("library.anima_utils:identities"),
    strategies=Ref("library.strategy_anima:build_strategies"),
    model_spec=Ref("library.anima_utils:model_spec"),
    metadata_keys=(
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "timestep_sampling",
        "sigmoid_scale",
        "discrete_flow_shift",
    ),
    exports=(
        ExportPart(
            prefixes=("lora_te",),
            part="text_encoder:0",
            diffusers=None,
            comfy="text_encoders.qwen3_06b.transformer.model",
        ),
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="transformer",
            comfy="diffusion_model",
            layers=Ref("library.anima_utils:DIFFUSERS_LAYERS"),
        ),
    ),
    inference=InferenceSpec(
        option_groups=(AnimaInferenceOptions, ScriptInferenceOptions),
        hidden=frozenset(NAMES),
        names=NAMES,
        training={
            "dit": "pretrained_model_name_or_path",
            "text_encoder": "qwen3",
            **{
                name: name
                for name in (
                    "vae",
                    "llm_adapter_path",
                    "t5_tokenizer_path",
                    "qwen3_max_token_length",
                    "t5_max_token_length",
                    "attn_mode",
                    "vae_chunk_size",
                    "vae_disable_cache",
                )
            },
        },
        prompt={"flow_shift": "flow_shift"},
        denoiser_format="dit_dtype",
        vae_format="vae_dtype",
        encoder_formats=("text_encoder_dtype",),
        shared=inference_values,
    ),
)
