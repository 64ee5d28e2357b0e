"""Lumina Image 2.0: flags, checks, family record."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.family import Family, LatentSpec, TextSpec
from library.options.checks import text_caching_problems
from library.options.flow import FlowOptions, FlowSamplingOptions
from library.options.full import FusedUpdateOptions
from library.options.network import NetworkOptions
from library.options.ranges import at_least, exclusive
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
    sample_batch_size: int | None = option(None, help="sample images made at a time; the batch size when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1, gemma2_max_token_length=self.gemma2_max_token_length, sample_batch_size=self.sample_batch_size
        )
        yield from exclusive(self, "use_flash_attn", "use_sage_attn")


def check(options: OptionSet, task: str) -> Iterator[Problem]:
    """Rules between options of Lumina scripts."""
    network = options.get(NetworkOptions)
    trained = task == "network" and network is not None and not network.network_train_unet_only
    yield from text_caching_problems(options, trains_cached_encoders=trained)


FAMILY = Family(
    name="lumina",
    title="Lumina Image 2.0",
    process="flow",
    tasks=frozenset({"network", "full"}),
    option_groups=(LuminaOptions, FlowOptions, FlowSamplingOptions),
    task_option_groups={"full": (FusedUpdateOptions,)},
    defaults={"discrete_flow_shift": 6.0, "timestep_sampling": "shift", "model_prediction_type": "raw"},
    choices={"timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")},
    tracker_names={"network": "network_train", "full": "finetuning"},
    check=check,
    latent=LatentSpec(channels=16, spatial_factor=8, resolution_step=16, cache_suffix="_lumina"),
    text=TextSpec(
        cache_suffix="_lumina_te", arrays={"hidden_state": "float", "input_ids": "int64", "attention_mask": "int64"}
    ),
)
