"""HunyuanImage 2.1: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.family import Family, LatentSpec, TextSpec
from library.options.attention import DitAttentionOptions
from library.options.checks import text_caching_problems
from library.options.compiling import CompileOptions
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.memory import VaeMemoryOptions
from library.options.schema import OptionSet, option


@dataclass(frozen=True, kw_only=True)
class HunyuanImageOptions:
    """HunyuanImage: its text encoders and 8-bit weights."""

    text_encoder: str | None = option(None, help="Qwen2.5-VL file")
    byt5: str | None = option(None, help="ByT5 file, for text in images")
    fp8_scaled: bool = option(False, help="keep the denoiser in scaled 8-bit floats")
    fp8_vl: bool = option(False, help="keep the vision-language encoder in 8-bit floats")
    text_encoder_cpu: bool = option(False, help="encode captions on the CPU")


def check(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.check
    """Rules between options of HunyuanImage scripts."""
    yield from text_caching_problems(options)
    if options[CompileOptions].compile_fullgraph and options[DitAttentionOptions].split_attn:
        yield Problem("--compile_fullgraph", "cannot be combined with --split_attn")


FAMILY = Family(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    process="flow",
    tasks=frozenset({"network", "full"}),
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
)
