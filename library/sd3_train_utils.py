"""Stable Diffusion 3 and 3.5: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem
from library.family import ExportPart, Family, InferenceSpec, LatentSpec, Ref, TextSpec
from library.options.checks import network_switch, text_caching_problems
from library.options.flow import FlowOptions
from library.options.full import FusedUpdateOptions, TextEncoderTrainingOptions
from library.options.ranges import above, at_least, exclusive, share
from library.options.schema import OptionSet, option


@dataclass(frozen=True, kw_only=True)
class Sd3Options:
    """Stable Diffusion 3: text encoders and noise levels."""

    clip_l: str | None = option(None, help="CLIP-L file; the one in the model when not given")
    clip_g: str | None = option(None, help="CLIP-G file; the one in the model when not given")
    t5xxl: str | None = option(None, help="T5-XXL file; the one in the model when not given")
    save_clip: bool = option(False, help="put the CLIP encoders into the saved model (does nothing)")
    save_t5xxl: bool = option(False, help="put T5-XXL into the saved model (does nothing)")
    t5xxl_device: str | None = option(None, help="device of T5-XXL (does nothing)")
    t5xxl_dtype: str | None = option(None, help="number format of T5-XXL (does nothing)")
    t5xxl_max_token_length: int = option(256, help="longest caption in T5 tokens")
    apply_lg_attn_mask: bool = option(False, help="keep CLIP padding out of attention")
    apply_t5_attn_mask: bool = option(False, help="keep T5 padding out of attention")
    clip_l_dropout_rate: float = option(0.0, help="share of captions that CLIP-L does not see")
    clip_g_dropout_rate: float = option(0.0, help="share of captions that CLIP-G does not see")
    t5_dropout_rate: float = option(0.0, help="share of captions that T5 does not see")
    pos_emb_random_crop_rate: float = option(0.0, help="share of steps with positions cropped at random (3.5)")
    enable_scaled_pos_embed: bool = option(False, help="scale positions to the image size when training many sizes")
    training_shift: float = option(1.0, help="shift of trained noise levels: above 1 more noise, below 1 less")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, t5xxl_max_token_length=self.t5xxl_max_token_length)
        yield from above(0, training_shift=self.training_shift)
        yield from share(
            clip_l_dropout_rate=self.clip_l_dropout_rate,
            clip_g_dropout_rate=self.clip_g_dropout_rate,
            t5_dropout_rate=self.t5_dropout_rate,
            pos_emb_random_crop_rate=self.pos_emb_random_crop_rate,
        )


@dataclass(frozen=True, kw_only=True)
class Sd3InferenceOptions:
    """Stable Diffusion 3: its files and number format."""

    ckpt_path: str = option(help="model file")
    clip_l: str | None = option(None, help="CLIP-L file; the one in the model when not given")
    clip_g: str | None = option(None, help="CLIP-G file; the one in the model when not given")
    t5xxl: str | None = option(None, help="T5-XXL file; the one in the model when not given")
    vae: str | None = option(None, help="another VAE to use instead of the one in the model")
    t5xxl_token_length: int = option(256, help="longest prompt in T5 tokens")
    apply_lg_attn_mask: bool = option(False, help="keep CLIP padding out of attention")
    apply_t5_attn_mask: bool = option(False, help="keep T5 padding out of attention")
    flow_shift: float = option(3.0, help="shift of the noise levels towards noise")
    fp16: bool = option(False, help="the same as --dtype fp16")
    bf16: bool = option(False, help="the same as --dtype bf16")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, t5xxl_token_length=self.t5xxl_token_length)
        yield from above(0, flow_shift=self.flow_shift)
        yield from exclusive(self, "fp16", "bf16")


def _number_format(options: OptionSet) -> dict[str, Any]:
    """The shared flag that `--fp16` and `--bf16` stand for."""
    return next(({"dtype": name} for name in ("fp16", "bf16") if options.value(name)), {})


@dataclass(frozen=True, kw_only=True)
class Sd3FullOptions:
    """Parts of Stable Diffusion 3: what is trained."""

    train_t5xxl: bool = option(False, help="train T5-XXL too")
    use_t5xxl_cache_only: bool = option(False, help="cache the outputs of T5-XXL but not those of CLIP")
    num_last_block_to_freeze: int | None = option(None, help="number of last blocks that stay as they are")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, num_last_block_to_freeze=self.num_last_block_to_freeze)


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of SD3 scripts."""
    if task == "network":
        yield from text_caching_problems(options, trains_cached_encoders=network_switch(options, "train_t5xxl"))
        return
    encoders, parts = options[TextEncoderTrainingOptions], options[Sd3FullOptions]
    trained = (encoders.train_text_encoder and not parts.use_t5xxl_cache_only) or parts.train_t5xxl
    yield from text_caching_problems(options, trains_cached_encoders=trained)
    if parts.train_t5xxl and not encoders.train_text_encoder:
        yield Problem("--train_t5xxl", "needs --train_text_encoder")


FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    process="flow",
    tasks=frozenset({"network", "full"}),
    available_tasks=frozenset({"network"}),
    option_groups=(Sd3Options, FlowOptions),
    task_option_groups={"full": (TextEncoderTrainingOptions, Sd3FullOptions, FusedUpdateOptions)},
    task_hidden={"full": frozenset({"learning_rate_te", "mem_eff_save"})},
    tracker_names={"network": "network_train", "full": "finetuning"},
    check=check,
    latent=LatentSpec(channels=16, spatial_factor=8, resolution_step=16, cache_suffix="_sd3"),
    text=TextSpec(
        cache_suffix="_sd3_te",
        arrays={
            "lg_out": "float",
            "t5_out": "float",
            "lg_pooled": "float",
            "clip_l_attn_mask": "int64",
            "clip_g_attn_mask": "int64",
            "t5_attn_mask": "int64",
            "apply_lg_attn_mask": "bool",
            "apply_t5_attn_mask": "bool",
        },
    ),
    default_network="networks.lora_sd3",
    inspect=Ref("library.sd3_utils:inspect"),
    load=Ref("library.sd3_utils:load_components"),
    identities=Ref("library.sd3_utils:identities"),
    strategies=Ref("library.strategy_sd3:build_strategies"),
    model_spec=Ref("library.sd3_utils:model_spec"),
    metadata_keys=(
        "apply_lg_attn_mask",
        "apply_t5_attn_mask",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
    ),
    inference=InferenceSpec(
        option_groups=(Sd3InferenceOptions,),
        defaults={
            "width": 1024,
            "height": 1024,
            "steps": 50,
            "cfg_scale": 5.0,
            "seed": 1,
            "negative_prompt": "",
            "dtype": "float32",
        },
        training={
            "ckpt_path": "pretrained_model_name_or_path",
            "t5xxl_token_length": "t5xxl_max_token_length",
            **{name: name for name in ("clip_l", "clip_g", "t5xxl", "vae", "apply_lg_attn_mask", "apply_t5_attn_mask")},
        },
        prompt={"flow_shift": "flow_shift"},
        encoder_formats=("dtype", "dtype", "dtype"),
        shared=_number_format,
    ),
    exports=(
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="transformer",
            comfy="diffusion_model",
            layers=Ref("library.sd3_utils:diffusers_layers"),
        ),
        ExportPart(
            prefixes=("lora_te1",),
            part="text_encoder:0",
            diffusers="text_encoder",
            comfy="text_encoders.clip_l.transformer",
            published_names=True,
        ),
        ExportPart(
            prefixes=("lora_te2",),
            part="text_encoder:1",
            diffusers="text_encoder_2",
            comfy="text_encoders.clip_g.transformer",
            published_names=True,
        ),
        ExportPart(
            prefixes=("lora_te3",), part="text_encoder:2", diffusers=None, comfy="text_encoders.t5xxl.transformer"
        ),
    ),
)
