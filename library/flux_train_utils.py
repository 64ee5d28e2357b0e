"""FLUX.1 and Chroma: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.family import ExportPart, Family, InferenceSpec, LatentSpec, Ref, TextSpec
from library.options.caching import TextCachingOptions
from library.options.checks import network_switch, text_caching_problems
from library.options.control_net import ControlNetOptions
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.full import FusedUpdateOptions
from library.options.inference import format_problems
from library.options.memory import MemoryOptions
from library.options.ranges import at_least
from library.options.schema import OptionSet, option
from library.options.tasks import FULL_MODEL_FORMATS


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """FLUX: its text encoders, autoencoder and guidance."""

    clip_l: str | None = option(None, help="CLIP-L file")
    t5xxl: str | None = option(None, help="T5-XXL file")
    ae: str | None = option(None, help="autoencoder file")
    t5xxl_max_token_length: int | None = option(
        None, help="longest caption in T5 tokens; 256 for schnell and 512 for the others when not given"
    )
    apply_t5_attn_mask: bool = option(False, help="keep T5 padding out of attention")
    guidance_scale: float = option(3.5, help="guidance value that the model is trained with; only dev reads it")
    model_type: str = option("flux", help="architecture", choices=("flux", "chroma"))

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, t5xxl_max_token_length=self.t5xxl_max_token_length)
        yield from at_least(0, guidance_scale=self.guidance_scale)
        if self.model_type == "chroma" and not self.apply_t5_attn_mask:
            yield Problem("--model_type", "Chroma needs --apply_t5_attn_mask", "chroma")
        if self.model_type == "chroma" and self.guidance_scale != 0:
            yield Problem("--guidance_scale", "Chroma is trained with guidance 0; give --guidance_scale 0")


@dataclass(frozen=True, kw_only=True)
class FluxSwapOptions:
    """Old block-swap flags of FLUX."""

    double_blocks_to_swap: int | None = option(None, help="double blocks to swap", deprecated="use --blocks_to_swap")
    single_blocks_to_swap: int | None = option(None, help="single blocks to swap", deprecated="use --blocks_to_swap")


@dataclass(frozen=True, kw_only=True)
class FluxSplitOptions:
    """Old memory flag of FLUX."""

    split_mode: bool = option(False, help="train half of the model at a time", deprecated="use --blocks_to_swap 18")


@dataclass(frozen=True, kw_only=True)
class FluxInferenceOptions:
    """FLUX: its files, their number formats, and guidance."""

    ckpt_path: str = option(help="transformer file")
    model_type: str = option("flux", help="architecture", choices=("flux", "chroma"))
    clip_l: str | None = option(None, help="CLIP-L file")
    t5xxl: str | None = option(None, help="T5-XXL file")
    ae: str | None = option(None, help="autoencoder file")
    apply_t5_attn_mask: bool = option(False, help="keep T5 padding out of attention")
    t5xxl_max_token_length: int | None = option(
        None, help="longest prompt in T5 tokens; 256 for schnell and 512 for the others when not given"
    )
    guidance: float = option(3.5, help="guidance value; only dev reads it")
    flux_dtype: str | None = option(None, help="number format of the transformer; fp8 keeps its weights in 8 bits")
    clip_l_dtype: str | None = option(None, help="number format of CLIP-L; fp8 keeps its weights in 8 bits")
    t5xxl_dtype: str | None = option(None, help="number format of T5; fp8 keeps its weights in 8 bits")
    ae_dtype: str | None = option(None, help="number format of the autoencoder")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, t5xxl_max_token_length=self.t5xxl_max_token_length)
        yield from at_least(0, guidance=self.guidance)
        if self.model_type == "chroma" and not self.apply_t5_attn_mask:
            yield Problem("--model_type", "Chroma needs --apply_t5_attn_mask", "chroma")
        if self.model_type == "chroma" and self.guidance != 0:
            yield Problem("--guidance", "Chroma was trained with guidance 0; give --guidance 0, and --cfg_scale 4")
        yield from format_problems(self, "ae_dtype", weights_only=("flux_dtype", "clip_l_dtype", "t5xxl_dtype"))


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of FLUX scripts."""
    flux, caching, memory = options[FluxOptions], options[TextCachingOptions], options[MemoryOptions]
    yield from text_caching_problems(options)
    if caching.active and task == "network" and network_switch(options, "train_t5xxl"):
        # CLIP may be trained: its short captions are encoded again in every step, only T5 is kept
        yield Problem("--cache_text_encoder_outputs", "cannot be combined with --network_args train_t5xxl=True")
    if task == "control_net" and flux.model_type != "flux":
        yield Problem("--model_type", "ControlNets are trained for flux only", flux.model_type)
    split = options.get(FluxSplitOptions)
    if split is not None and split.split_mode and memory.cpu_offload_checkpointing:
        yield Problem("--split_mode", "cannot be combined with --cpu_offload_checkpointing")


def missing(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.missing
    """Files without which FLUX cannot be trained."""
    flux = options[FluxOptions]
    if flux.clip_l is None and flux.model_type == "flux":
        yield Problem("--clip_l", "is required: the CLIP-L text encoder")
    if flux.t5xxl is None:
        yield Problem("--t5xxl", "is required: the T5-XXL text encoder")
    if flux.ae is None:
        yield Problem("--ae", "is required: the autoencoder")


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    process="flow",
    tasks=frozenset({"network", "full", "control_net"}),
    available_tasks=frozenset({"network"}),
    option_groups=(FluxOptions, FlowOptions, FlowSamplingOptions),
    task_option_groups={
        "network": (ControlNetOptions, FluxSplitOptions),
        "full": (ControlNetOptions, FusedUpdateOptions, FluxSwapOptions),
        "control_net": (FusedUpdateOptions, FluxSwapOptions),
    },
    hidden=frozenset({"control_net_lr"}),
    task_defaults={"control_net": {"save_model_as": None}},
    task_choices={"control_net": {"save_model_as": FULL_MODEL_FORMATS}},
    tracker_names={"network": "network_train", "full": "finetuning", "control_net": "finetuning"},
    check=check,
    missing=missing,
    latent=LatentSpec(channels=16, spatial_factor=8, resolution_step=16, cache_suffix="_flux"),
    text=TextSpec(
        cache_suffix="_flux_te",
        arrays={
            "l_pooled": "float",
            "t5_out": "float",
            "txt_ids": "float",
            "t5_attn_mask": "int64",
            "apply_t5_attn_mask": "bool",
        },
    ),
    default_network="networks.lora_flux",
    inspect=Ref("library.flux_utils:inspect"),
    load=Ref("library.flux_utils:load_components"),
    identities=Ref("library.flux_utils:identities"),
    strategies=Ref("library.strategy_flux:build_strategies"),
    model_spec=Ref("library.flux_utils:model_spec"),
    metadata_keys=(
        "model_type",
        "apply_t5_attn_mask",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "guidance_scale",
        "timestep_sampling",
        "sigmoid_scale",
        "model_prediction_type",
        "discrete_flow_shift",
    ),
    exports=(
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="transformer",
            comfy="diffusion_model",
            layers=Ref("library.flux_utils:DIFFUSERS_LAYERS"),
        ),
        ExportPart(
            prefixes=("lora_te1",),
            part="text_encoder:0",
            diffusers="text_encoder",
            comfy="text_encoders.clip_l.transformer",
            published_names=True,
        ),
        ExportPart(
            prefixes=("lora_te3",), part="text_encoder:1", diffusers=None, comfy="text_encoders.t5xxl.transformer"
        ),
    ),
    inference=InferenceSpec(
        option_groups=(FluxInferenceOptions,),
        defaults={"width": 1360, "height": 768},
        training={
            "ckpt_path": "pretrained_model_name_or_path",
            "guidance": "guidance_scale",
            **{
                name: name
                for name in ("clip_l", "t5xxl", "ae", "model_type", "apply_t5_attn_mask", "t5xxl_max_token_length")
            },
        },
        prompt={"guidance": "guidance_scale"},
        # schnell was distilled on unshifted noise levels
        variants={"dev": {"sample_steps": 50}, "schnell": {"sample_steps": 4, "flow_shift": 1.0}},
        denoiser_format="flux_dtype",
        vae_format="ae_dtype",
        encoder_formats=("clip_l_dtype", "t5xxl_dtype"),
    ),
)
