"""Stable Diffusion 1.x and 2.x: flags, checks, family record."""

from collections.abc import Iterator

from library.base.errors import Problem
from library.family import ExportPart, Family, LatentSpec, Ref
from library.options.attention import DiffusersAttentionOptions
from library.options.caching import CachingOptions
from library.options.checks import text_caching_problems
from library.options.full import DreamBoothOptions, TextEncoderTrainingOptions
from library.options.model import InpaintingOptions
from library.options.network import NetworkOptions
from library.options.schema import OptionSet
from library.options.tasks import Preset


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of Stable Diffusion scripts."""
    network = options.get(NetworkOptions)
    trains_text_encoder = task == "network" and network is not None and not network.network_train_unet_only
    yield from text_caching_problems(options, trains_cached_encoders=trains_text_encoder)
    inpainting, caching = options.get(InpaintingOptions), options.get(CachingOptions)
    if inpainting is None or caching is None or not inpainting.train_inpainting:
        return
    if caching.cache_latents or caching.cache_latents_to_disk:
        yield Problem(
            "--train_inpainting", "cannot be combined with cached latents: other parts are kept in every step"
        )


FAMILY = Family(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    process="ddpm",
    tasks=frozenset({"network", "full", "control_net", "textual_inversion", "leco"}),
    available_tasks=frozenset({"network"}),
    task_option_groups={
        "network": (InpaintingOptions,),
        "full": (InpaintingOptions, TextEncoderTrainingOptions),
        "textual_inversion": (InpaintingOptions,),
    },
    task_hidden={
        "full": frozenset({"learning_rate_te1", "learning_rate_te2", "learning_rate_te3"}),
        "control_net": frozenset({"control_net_lr", "use_safetensors"}),
    },
    presets={
        "dreambooth": Preset(
            name="dreambooth",
            tracker_name="dreambooth",
            option_groups=(DreamBoothOptions,),
            hidden=frozenset({"in_json", "dataset_repeats", "train_text_encoder"}),
        ),
        "finetune": Preset(
            name="finetune",
            tracker_name="finetuning",
            option_groups=(DiffusersAttentionOptions,),
            hidden=frozenset({"reg_data_dir", "prior_loss_weight"}),
        ),
    },
    tracker_names={
        "network": "network_train",
        "full": "finetuning",
        "control_net": "controlnet_train",
        "textual_inversion": "textual_inversion",
        "leco": "network_train",
    },
    check=check,
    latent=LatentSpec(channels=4, spatial_factor=8, resolution_step=64, cache_suffix="_sd", unsized_caches=True),
    default_network="networks.lora",
    inspect=Ref("library.sd_utils:inspect"),
    load=Ref("library.sd_utils:load_components"),
    identities=Ref("library.sd_utils:identities"),
    strategies=Ref("library.strategy_sd:build_strategies"),
    model_spec=Ref("library.sd_utils:model_spec"),
    exports=(
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="unet",
            layers=Ref("library.sd_utils:diffusers_layers"),
        ),
        ExportPart(
            prefixes=("lora_te", "lora_te1"), part="text_encoder:0", diffusers="text_encoder", published_names=True
        ),
    ),
)
