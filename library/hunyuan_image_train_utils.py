"""HunyuanImage 2.1: flags, checks, family record."""

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
from library.options.ranges import at_least, share
from library.options.schema import OptionSet, option
from library.options.script_inference import NAMES, ScriptInferenceOptions, shared_values


@dataclass(frozen=True, kw_only=True)
class HunyuanImageOptions:
    """HunyuanImage: its text encoders and 8-bit weights."""

    text_encoder: str | None = option(None, help="Qwen2.5-VL file")
    byt5: str | None = option(None, help="ByT5 file, for text in images")
    fp8_scaled: bool = option(False, help="keep the denoiser in scaled 8-bit floats")
    fp8_vl: bool = option(False, help="keep the vision-language encoder in 8-bit floats")
    text_encoder_cpu: bool = option(False, help="encode captions on the CPU")


@dataclass(frozen=True, kw_only=True)
class HunyuanImageInferenceOptions:
    """HunyuanImage: its files, guidance, and how its parts compute."""

    dit: str = option(help="transformer file")
    text_encoder: str = option(help="Qwen2.5-VL file")
    byt5: str = option(help="ByT5 file, for text in images")
    vae: str = option(help="VAE file")
    apg_start_step_general: int = option(5, help="last of fifty steps with classifier-free guidance")
    apg_start_step_ocr: int = option(38, help="the same for prompts that quote text")
    guidance_rescale: float = option(0.0, help="how far classifier-free guidance keeps the prediction's spread")
    guidance_rescale_apg: float = option(0.0, help="the same of the guidance after it")
    attn_mode: str = option(
        "torch",
        help="implementation of attention; sdpa is another name of torch",
        choices=("flash", "torch", "sageattn", "xformers", "sdpa"),
    )
    vae_chunk_size: int | None = option(None, help="rows of an image that the VAE handles at a time")
    blocks_to_swap: int = option(0, help="does nothing: --offload keeps parts in main memory")
    save_merged_model: str | None = option(None, help="file of the model with the adapters (not there yet)")
    dit_dtype: str | None = option(None, help="number format of the transformer; fp8 keeps its weights in 8 bits")
    text_encoder_dtype: str | None = option(None, help="number format of Qwen2.5-VL; fp8 keeps its weights in 8 bits")
    byt5_dtype: str | None = option(None, help="number format of ByT5")
    vae_dtype: str | None = option(None, help="number format of the VAE")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, vae_chunk_size=self.vae_chunk_size)
        yield from at_least(
            0, apg_start_step_general=self.apg_start_step_general, apg_start_step_ocr=self.apg_start_step_ocr
        )
        yield from share(guidance_rescale=self.guidance_rescale, guidance_rescale_apg=self.guidance_rescale_apg)
        formats = ("dit_dtype", "text_encoder_dtype")
        yield from format_problems(self, "vae_dtype", "byt5_dtype", weights_only=formats)
        if self.save_merged_model:
            message = "merged models are not written in this version yet; leave it out, and images are made"
            yield Problem("--save_merged_model", message, self.save_merged_model)


def inference_values(options: OptionSet) -> dict[str, Any]:
    """What flags of the script say under the names of others."""
    own = options[ScriptInferenceOptions]
    return {**shared_values(options), **({"dit_dtype": "fp8"} if own.fp8 or own.fp8_scaled else {})}


def check(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.check
    """Rules between options of HunyuanImage scripts."""
    yield from text_caching_problems(options)
    if options[CompileOptions].compile_fullgraph and options[DitAttentionOptions].split_attn:
        yield Problem("--compile_fullgraph", "cannot be combined with --split_attn")


def missing(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.missing
    """Files without which HunyuanImage cannot be trained."""
    own = options[HunyuanImageOptions]
    if own.text_encoder is None:
        yield Problem("--text_encoder", "is required: the Qwen2.5-VL text encoder")
    if own.byt5 is None:
        yield Problem("--byt5", "is required: the byT5 text encoder")
    if options[ModelOptions].vae is None:
        yield Problem("--vae", "is required: the VAE")


FAMILY = Family(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    process="flow",
    tasks=frozenset({"network", "full"}),
    available_tasks=frozenset({"network"}),
    option_groups=(
        HunyuanImageOptions,
        DitAttentionOptions,
        VaeMemoryOptions,
        FlowOptions,
        FlowSamplingOptions,
    ),
    hidden=frozenset({"vae_disable_cache", "qwen_image_vae_2d"}),
    defaults={"discrete_flow_shift": 5.0, "model_prediction_type": "raw"},
    tracker_names={"network": "network_train", "full": "finetuning"},
    check=check,
    missing=missing,
    latent=LatentSpec(channels=64, spatial_factor=32, resolution_step=32, cache_suffix="_hi"),
    text=TextSpec(
        cache_suffix="_hi_te",
        arrays={
            "vlm_embed": "float",
            "vlm_mask": "int64",
            "byt5_embed": "float",
            "byt5_mask": "int64",
            "ocr_mask": "bool",
        },
    ),
    default_network="networks.lora_hunyuan_image",
    inspect=Ref("library.hunyuan_image_utils:inspect"),
    load=Ref("library.hunyuan_image_utils:load_components"),
    identities=Ref("library.hunyuan_image_utils:identities"),
    strategies=Ref("library.strategy_hunyuan_image:build_strategies"),
    model_spec=Ref("library.hunyuan_image_utils:model_spec"),
    metadata_keys=(
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "timestep_sampling",
        "sigmoid_scale",
        "model_prediction_type",
        "discrete_flow_shift",
    ),
    inference=InferenceSpec(
        option_groups=(HunyuanImageInferenceOptions, ScriptInferenceOptions),
        hidden=frozenset(NAMES),
        names=NAMES,
        defaults={"image_size": [2048, 2048]},
        training={
            "dit": "pretrained_model_name_or_path",
            **{name: name for name in ("text_encoder", "byt5", "vae", "attn_mode", "vae_chunk_size")},
        },
        prompt={"flow_shift": "flow_shift"},
        denoiser_format="dit_dtype",
        vae_format="vae_dtype",
        encoder_formats=("text_encoder_dtype", "byt5_dtype"),
        shared=inference_values,
        tune=Ref("library.strategy_hunyuan_image:set_guidance"),
    ),
    exports=(
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="transformer",
            comfy="diffusion_model",
            layers=Ref("library.hunyuan_image_utils:DIFFUSERS_LAYERS"),
            comfy_layers=Ref("library.hunyuan_image_utils:COMFY_LAYERS"),
        ),
    ),
)
