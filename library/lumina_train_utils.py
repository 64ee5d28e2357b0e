"""Lumina Image 2.0: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.family import ExportPart, Family, InferenceSpec, LatentSpec, Ref, TextSpec
from library.options.checks import text_caching_problems
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.full import FusedUpdateOptions
from library.options.inference import format_problems
from library.options.network import NetworkOptions
from library.options.ranges import above, at_least, exclusive
from library.options.schema import OptionSet, option


@dataclass(frozen=True, kw_only=True)
class LuminaOptions:
    """Lumina: its text encoder, autoencoder and attention."""

    gemma2: str | None = option(None, help="Gemma-2 file")
    ae: str | None = option(None, help="autoencoder file")
    gemma2_max_token_length: int | None = option(None, help="longest caption in Gemma tokens; 256 when not given")
    use_flash_attn: bool = option(False, help="attention of the flash-attn package")
    use_sage_attn: bool = option(False, help="attention of the sageattention package")
    system_prompt: str = option("", help="instruction put before every caption")
    add_system_prompt_to_negative_prompt: bool = option(
        False, help="put the instruction before the negative prompts of sample images too"
    )
    sample_batch_size: int | None = option(None, help="sample images made at a time; the batch size when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1, gemma2_max_token_length=self.gemma2_max_token_length, sample_batch_size=self.sample_batch_size
        )
        yield from exclusive(self, "use_flash_attn", "use_sage_attn")


@dataclass(frozen=True, kw_only=True)
class LuminaInferenceOptions:
    """Lumina: its files, their number formats, text, image and guidance."""

    pretrained_model_name_or_path: str = option(help="transformer file")
    gemma2_path: str = option(help="Gemma-2 file")
    ae_path: str = option(help="autoencoder file")
    image_width: int = option(1024, help="pixels; rounded down to what the model can make")
    image_height: int = option(1024, help="pixels; rounded down to what the model can make")
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1: none")
    cfg_trunc_ratio: float = option(0.25, help="guidance acts while the model's time, from 0 to 1, is below this")
    renorm_cfg: float = option(1.0, help="largest growth of the prediction's norm by guidance; 0: any")
    discrete_flow_shift: float = option(6.0, help="shift of the noise levels towards noise")
    system_prompt: str = option("", help="instruction put before the prompt")
    add_system_prompt_to_negative_prompt: bool = option(
        False, help="put the instruction before the negative prompt too"
    )
    gemma2_max_token_length: int | None = option(256, help="longest prompt in Gemma tokens")
    gemma2_dtype: str | None = option("bf16", help="number format of Gemma-2; fp8 keeps its weights in 8 bits")
    ae_dtype: str | None = option("bf16", help="number format of the autoencoder")
    use_flash_attn: bool = option(False, help="attention of the flash-attn package")
    use_sage_attn: bool = option(False, help="attention of the sageattention package")
    device: str | None = option(None, help="where the image is made, as in cuda or cpu; the best one when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, gemma2_max_token_length=self.gemma2_max_token_length)
        yield from at_least(1, image_width=self.image_width, image_height=self.image_height)
        yield from at_least(
            0, guidance_scale=self.guidance_scale, cfg_trunc_ratio=self.cfg_trunc_ratio, renorm_cfg=self.renorm_cfg
        )
        yield from above(0, discrete_flow_shift=self.discrete_flow_shift)
        yield from exclusive(self, "use_flash_attn", "use_sage_attn")
        yield from format_problems(self, "ae_dtype", weights_only=("gemma2_dtype",))


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of Lumina scripts."""
    network = options.get(NetworkOptions)
    trained = task == "network" and network is not None and not network.network_train_unet_only
    yield from text_caching_problems(options, trains_cached_encoders=trained)


def missing(options: OptionSet, task: str) -> Iterator[Problem]:  # noqa: ARG001 - the signature of Family.missing
    """Files without which Lumina cannot be trained."""
    lumina = options[LuminaOptions]
    if lumina.gemma2 is None:
        yield Problem("--gemma2", "is required: the Gemma-2 text encoder")
    if lumina.ae is None:
        yield Problem("--ae", "is required: the autoencoder")


FAMILY = Family(
    name="lumina",
    title="Lumina Image 2.0",
    process="flow",
    tasks=frozenset({"network", "full"}),
    available_tasks=frozenset({"network"}),
    option_groups=(LuminaOptions, FlowOptions, FlowSamplingOptions),
    task_option_groups={"full": (FusedUpdateOptions,)},
    defaults={"discrete_flow_shift": 6.0, "timestep_sampling": "shift", "model_prediction_type": "raw"},
    choices={"timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")},
    tracker_names={"network": "network_train", "full": "finetuning"},
    check=check,
    missing=missing,
    latent=LatentSpec(channels=16, spatial_factor=8, resolution_step=16, cache_suffix="_lumina"),
    text=TextSpec(
        cache_suffix="_lumina_te", arrays={"hidden_state": "float", "input_ids": "int64", "attention_mask": "int64"}
    ),
    default_network="networks.lora_lumina",
    inspect=Ref("library.lumina_utils:inspect"),
    load=Ref("library.lumina_utils:load_components"),
    identities=Ref("library.lumina_utils:identities"),
    strategies=Ref("library.strategy_lumina:build_strategies"),
    model_spec=Ref("library.lumina_utils:model_spec"),
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
    exports=(
        ExportPart(
            prefixes=("lora_unet",),
            part="denoiser",
            diffusers="transformer",
            comfy="diffusion_model",
            layers=Ref("library.lumina_utils:DIFFUSERS_LAYERS"),
        ),
        ExportPart(
            prefixes=("lora_te",),
            part="text_encoder:0",
            diffusers=None,
            comfy="text_encoders.gemma2_2b.transformer.model",
        ),
    ),
    inference=InferenceSpec(
        option_groups=(LuminaInferenceOptions,),
        hidden=frozenset({"width", "height", "cfg_scale"}),
        defaults={
            "prompt": "A beautiful sunset over the mountains",
            "negative_prompt": "",
            "output_dir": "outputs",
            "steps": 36,
            "dtype": "bf16",
        },
        training={
            "gemma2_path": "gemma2",
            "ae_path": "ae",
            **{
                name: name
                for name in (
                    "pretrained_model_name_or_path",
                    "gemma2_max_token_length",
                    "system_prompt",
                    "add_system_prompt_to_negative_prompt",
                    "use_flash_attn",
                    "use_sage_attn",
                )
            },
        },
        prompt={
            "image_width": "width",
            "image_height": "height",
            "guidance_scale": "scale",
            "cfg_trunc_ratio": "cfg_trunc_ratio",
            "renorm_cfg": "renorm_cfg",
            "discrete_flow_shift": "flow_shift",
        },
        vae_format="ae_dtype",
        encoder_formats=("gemma2_dtype",),
    ),
)
