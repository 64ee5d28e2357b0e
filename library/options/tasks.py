"""What can be trained: the option groups of each task, and the presets of its scripts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.options.attention import AttentionOptions
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.captions import CaptionOptions
from library.options.compiling import CompileOptions
from library.options.config import ConfigOptions
from library.options.control_net import ControlNetOptions, LLLiteOptions
from library.options.data import AugmentOptions, BucketOptions, DataOptions
from library.options.debug import RecordOptions
from library.options.distributed import DeepSpeedOptions, DistributedOptions
from library.options.ema import EmaOptions
from library.options.flow import TimestepViewOptions
from library.options.hub import HubOptions
from library.options.inversion import InversionOptions
from library.options.leco import LecoOptions
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions, SnrLossOptions
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schedule import LengthOptions, ScheduleOptions
from library.options.state import StateOptions
from library.options.tracking import TrackingOptions
from library.options.validation import ValidationOptions

FULL_MODEL_FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")

_DATA = (DataOptions, BucketOptions, AugmentOptions, CaptionOptions, CachingOptions, TextCachingOptions)
_COMPUTE = (PrecisionOptions, MemoryOptions, AttentionOptions, CompileOptions)
_OPTIMIZE = (OptimizerOptions, ScheduleOptions, LengthOptions, EmaOptions)
_JUDGE = (NoiseOptions, LossOptions, SnrLossOptions, TimestepViewOptions)
_OUTPUT = (SavingOptions, StateOptions, MetadataOptions, SamplingOptions, TrackingOptions, HubOptions)
_RUN = (DistributedOptions, DeepSpeedOptions, RecordOptions, LoggingOptions)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that can be trained.

    Attributes:
        name: "network", "full", ...
        title: what a script of this task does, for its help; `{}` stands for the model family.
        option_groups: shared groups, in help order; a family adds its own.
        implementation: reference to the task class; None where this version has none.
        hidden: fields of these groups that make no sense for the task.
        defaults: changed defaults by field name.
        choices: changed choices by field name.
    """

    name: str
    title: str
    option_groups: tuple[type, ...]
    implementation: str | None = None
    hidden: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _with_data(*own: type) -> tuple[type, ...]:
    return (
        *(ConfigOptions, ModelOptions, *own, *_DATA, *_OPTIMIZE, *_JUDGE, *_COMPUTE, *_OUTPUT),
        *(ValidationOptions, *_RUN),
    )


_NETWORK_ONLY = frozenset({"fp8_base_unet", "initial_epoch", "initial_step", "skip_until_initial_step"})
_METADATA_SWITCHES = frozenset({"no_metadata", "training_comment"})
_EPOCHS = frozenset(
    {
        "max_train_epochs",
        "initial_epoch",
        "save_every_n_epochs",
        "save_n_epoch_ratio",
        "save_last_n_epochs",
        "save_last_n_epochs_state",
        "sample_every_n_epochs",
    }
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="network",
            title="Train an adapter (LoRA and its kin) on {}.",
            option_groups=_with_data(NetworkOptions),
            implementation="library.training.tasks.network:NetworkTask",
            hidden=frozenset({"use_safetensors"}),
        ),
        Task(
            name="full",
            title="Train the whole denoiser of {}.",
            option_groups=_with_data(),
            hidden=_NETWORK_ONLY | _METADATA_SWITCHES,
            defaults={"save_model_as": None},
            choices={"save_model_as": FULL_MODEL_FORMATS},
        ),
        Task(
            name="control_net",
            title="Train a ControlNet for {}.",
            option_groups=_with_data(ControlNetOptions),
            hidden=_NETWORK_ONLY | _METADATA_SWITCHES | {"reg_data_dir", "prior_loss_weight"},
        ),
        Task(
            name="lllite",
            title="Train a ControlNet-LLLite for {}.",
            option_groups=_with_data(LLLiteOptions),
            hidden=_NETWORK_ONLY | _METADATA_SWITCHES | {"reg_data_dir", "prior_loss_weight", "use_safetensors"},
        ),
        Task(
            name="textual_inversion",
            title="Train the vectors of a new word for {}.",
            option_groups=_with_data(InversionOptions),
            hidden=_NETWORK_ONLY
            | _METADATA_SWITCHES
            | {
                "caption_dropout_rate",
                "caption_dropout_every_n_epochs",
                "caption_tag_dropout_rate",
                "weighted_captions",
                "cache_text_encoder_outputs",
                "cache_text_encoder_outputs_to_disk",
                "text_encoder_batch_size",
                "use_safetensors",
            },
            defaults={"save_model_as": "pt"},
        ),
        Task(
            name="leco",
            title="Train an adapter on {} from prompts alone.",
            option_groups=(
                ConfigOptions,
                ModelOptions,
                LecoOptions,
                NetworkOptions,
                *_OPTIMIZE,
                *_COMPUTE,
                *_OUTPUT,
                *_RUN,
            ),
            hidden=_NETWORK_ONLY | _EPOCHS | {"use_safetensors"},
            defaults={"network_module": "networks.lora", "network_dim": 4},
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A variant of a task with a script of its own; travels in the option set, not a flag.

    Attributes:
        name: name of the preset.
        tracker_name: project name in trackers.
        option_groups: groups that only this script has.
        hidden: fields that this script does not offer.
    """

    name: str
    tracker_name: str
    option_groups: tuple[type, ...] = ()
    hidden: frozenset[str] = frozenset()
