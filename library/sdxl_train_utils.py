"""Stable Diffusion XL: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.family import ExportPart, Family, InferenceSpec, LatentSpec, Ref, TextSpec
from library.options.attention import DiffusersAttentionOptions
from library.options.checks import text_caching_problems
from library.options.full import FusedUpdateOptions, TextEncoderTrainingOptions
from library.options.model import InpaintingOptions, ModelOptions
from library.options.network import NetworkOptions
from library.options.schema import OptionSet, option

NUM_BLOCK_RATES = 23


@dataclass(frozen=True, kw_only=True)
class SdxlFullOptions:
    """Block rates: a learning rate for each part of the U-Net."""

    block_lr: str | None = option(None, help="23 learning rates separated by commas, from the input to the output")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.block_lr is None:
            return
        try:
            count = len([float(text) for text in self.block_lr.split(",")])
        except ValueError:
            count = 0
        if count != NUM_BLOCK_RATES:
            yield Problem("--block_lr", f"expected {NUM_BLOCK_RATES} numbers separated by commas", self.block_lr)


@dataclass(frozen=True, kw_only=True)
class SdxlInferenceOptions:
    """SDXL: its file, a prompt for its second encoder, and how images are made."""

    ckpt_path: str = option(help="model file")
    prompt2: str | None = option(None, help="prompt of the second text encoder; --prompt when not given")
    vae: str | None = option(None, help="another VAE to use instead of the one in the model")
    sampler: str = option("euler", help="sampling method")
    v_parameterization: bool = option(False, help="the model predicts velocity instead of noise")
    zero_terminal_snr: bool = option(False, help="the model was trained with --zero_terminal_snr")


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of SDXL scripts."""
    if options[ModelOptions].v2:
        yield Problem("--v2", "names Stable Diffusion 2.x; SDXL is another model")
    network, encoders = options.get(NetworkOptions), options.get(TextEncoderTrainingOptions)
    trained = task == "network" and network is not None and not network.network_train_unet_only
    trained = trained or (encoders is not None and encoders.train_text_encoder)
    yield from text_caching_problems(options, trains_cached_encoders=trained)


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    process="ddpm",
    tasks=frozenset({"network", "full", "control_net", "lllite", "textual_inversion", "leco"}),
    available_tasks=frozenset({"network"}),
    task_option_groups={
        "network": (InpaintingOptions,),
        "full": (
            InpaintingOptions,
            TextEncoderTrainingOptions,
            SdxlFullOptions,
            FusedUpdateOptions,
            DiffusersAttentionOptions,
        ),
    },
    task_hidden={
        "full": frozenset({"learning_rate_te", "learning_rate_te3", "blockwise_fused_optimizers", "mem_eff_save"}),
        "control_net": frozenset({"use_safetensors"}),
    },
    tracker_names={
        "network": "network_train",
        "full": "finetuning",
        "control_net": "sdxl_control_net_train",
        "lllite": "lllite_control_net_train",
        "textual_inversion": "textual_inversion",
        "leco": "network_train",
    },
    check=check,
    latent=LatentSpec(channels=4, spatial_factor=8, resolution_step=32, cache_suffix="_sdxl", unsized_caches=True),
    text=TextSpec(
        cache_suffix="_te_outputs", arrays={"hidden_state1": "float", "hidden_state2": "float", "pool2": "float"}
    ),
    default_network="networks.lora",
    inspect=Ref("library.sdxl_utils:inspect"),
    load=Ref("library.sdxl_utils:load_components"),
    identities=Ref("library.sdxl_utils:identities"),
    strategies=Ref("library.strategy_sdxl:build_strategies"),
    model_spec=Ref("library.sdxl_utils:model_spec"),
    inference=InferenceSpec(
        option_groups=(SdxlInferenceOptions,),
        defaults={"width": 1024, "height": 1024, "steps": 50, "cfg_scale": 7.0, "negative_prompt": ""},
        training={
            "ckpt_path": "pretrained_model_name_or_path",
            "sampler": "sample_sampler",
            **{name: name for name in ("vae", "v_parameterization", "zero_terminal_snr")},
        },
        prompt={"sampler": "sample_sampler"},
        encoder_formats=("dtype", "dtype"),
    ),
    exports=(
        ExportPart(prefixes=("lora_unet",), part="denoiser", diffusers="unet"),
        ExportPart(prefixes=("lora_te1",), part="text_encoder:0", diffusers="text_encoder", published_names=True),
        ExportPart(prefixes=("lora_te2",), part="text_encoder:1", diffusers="text_encoder_2", published_names=True),
    ),
)
