"""What the engine knows about one model family: pure data, heavy parts as references."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

from library.base.errors import Problem
from library.options.schema import OptionSet, build_parser, from_values, parse
from library.options.tasks import TASKS, Preset

Ref = NewType("Ref", str)
"""A "package.module:attribute" text, resolved by `library.base.lazy.resolve`."""


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Latents of a family.

    Attributes:
        channels: of the latents.
        spatial_factor: image pixels per latent pixel.
        resolution_step: image sides are multiples of this.
        cache_suffix: end of the names of cache files, without their format.
        unsized_caches: whether older caches name their arrays without the latents' size.
    """

    channels: int
    spatial_factor: int
    resolution_step: int
    cache_suffix: str
    unsized_caches: bool = False


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Cache files of text encoder outputs.

    Attributes:
        cache_suffix: end of their names, without the format.
        arrays: name -> "float", "int64", "int32" or "bool", in the order in which other programs read them.
    """

    cache_suffix: str
    arrays: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ExportPart:
    """The names that other programs have for one part of the model in adapter files.

    Attributes:
        prefixes: starts of our names.
        part: "denoiser" or "text_encoder:<index>".
        diffusers: component of diffusers' pipeline; None where its loaders read no adapters of the part.
        comfy: start of ComfyUI's names; None where it reads ours.
        layers: reference to the table of LayerRule of diffusers' names, or to a function that makes it for a variant;
            None where diffusers has the layer's own names.
        comfy_layers: the same for ComfyUI; None where it has the published names.
        published_names: whether diffusers' names are the published ones, not those inside its module.
    """

    prefixes: tuple[str, ...]
    part: str
    diffusers: str | None
    comfy: str | None = None
    layers: Ref | None = None
    comfy_layers: Ref | None = None
    published_names: bool = False


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The flags of one script: groups and how they deviate from their declaration."""

    groups: tuple[type, ...]
    description: str
    defaults: Mapping[str, Any]
    hidden: frozenset[str]
    choices: Mapping[str, tuple[Any, ...]]

    def parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """The parser, with defaults."""
        return build_parser(self.groups, prog, self.description, self.defaults, self.hidden, self.choices)

    def parse(self, argv: Sequence[str] | None, prog: str | None = None) -> OptionSet:
        """Options from a command line and the configuration file it names."""
        return parse(
            self.groups,
            argv,
            prog=prog,
            description=self.description,
            defaults=self.defaults,
            hidden=self.hidden,
            choices=self.choices,
        )

    def from_values(self, values: Mapping[str, Any]) -> OptionSet:
        """Options from Python values."""
        return from_values(self.groups, values, defaults=self.defaults, hidden=self.hidden, choices=self.choices)


@dataclass(frozen=True, kw_only=True)
class InferenceSpec:
    """What the script that makes images of a family without training reads, and how it differs from training.

    Attributes:
        option_groups: the family's own flags, in help order.
        hidden: shared flags that the script does not offer.
        defaults: changed defaults, by field name.
        training: flag -> the option of training that `inspect`, `load`, `strategies` and the checks read.
        prompt: flag -> the key of prompt files that it stands for, besides the shared ones.
        variants: name of a variant -> values of prompt files where its flags are not given.
        denoiser_format: flag of the denoiser's number format.
        vae_format: flag of the VAE's.
        encoder_formats: flags of the text encoders', in their order.
        shared: values of hidden shared flags, where the family's own flags say them.
        names: these flags -> what the family calls them.
        tune: reference to a function of (denoising strategy, options of the script) that takes over what no option of
            training says; None where there is nothing.
    """

    option_groups: tuple[type, ...]
    hidden: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, str]
    prompt: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    denoiser_format: str | None = None
    vae_format: str | None = None
    encoder_formats: tuple[str, ...] = ()
    shared: Callable[[OptionSet], Mapping[str, Any]] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    tune: Ref | None = None


def no_problems(options: OptionSet, task: str) -> Iterable[Problem]:  # noqa: ARG001 - the signature of Family.check
    """The check of a family without rules of its own."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        name: short name, as in script names ("flux").
        title: name for people ("FLUX.1").
        process: "ddpm" (discrete noise schedule) or "flow" (flow matching).
        tasks: what its scripts can be asked for.
        available_tasks: what this version can do of these.
        option_groups: family flags of every task, in help order.
        task_option_groups: further groups by task.
        hidden: shared fields that the family's scripts do not offer.
        task_hidden: further such fields by task.
        defaults: changed defaults of every task, by field name.
        task_defaults: further changed defaults by task.
        choices: changed choices, by field name.
        task_choices: further changed choices by task.
        presets: variants of a task with a script of their own, by name.
        tracker_names: project name in trackers by task.
        check: cross-option rules for (options, task).
        missing: required values that were not given, for (options, task).
        latent: sizes of latents, names of their caches.
        text: caches of text encoder outputs; None where no program keeps such files.
        default_network: module that makes the adapter when none is named.
        inspect: reference to the function that reads the variant from file headers: (options) -> Variant.
        load: reference to the function that loads the model: (options, need) -> Components.
        identities: reference to the function that tells encoders apart: (options) -> {"vae": text, "text": text}.
        save: reference to the SaveComponents function.
        strategies: reference to the BuildStrategies function.
        model_spec: reference to the function that names the architecture in saved files.
        metadata_keys: family flags that metadata repeats as `ss_<flag>`.
        inference: the script that makes images without training; None where there is none.
        exports: names of the model's parts in other programs' adapter files.
    """

    name: str
    title: str
    process: str
    tasks: frozenset[str]
    available_tasks: frozenset[str] = frozenset()
    option_groups: tuple[type, ...] = ()
    task_option_groups: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    task_hidden: Mapping[str, frozenset[str]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    task_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    task_choices: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)
    tracker_names: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[OptionSet, str], Iterable[Problem]] = no_problems
    missing: Callable[[OptionSet, str], Iterable[Problem]] = no_problems
    latent: LatentSpec
    text: TextSpec | None = None
    default_network: str | None = None
    inspect: Ref | None = None
    load: Ref | None = None
    identities: Ref | None = None
    save: Ref | None = None
    strategies: Ref | None = None
    model_spec: Ref | None = None
    metadata_keys: tuple[str, ...] = ()
    inference: InferenceSpec | None = None
    exports: tuple[ExportPart, ...] = ()

    def command_line(self, task: str, preset: str | None = None) -> CommandLine:
        """The flags of the script for (task, preset)."""
        shared = TASKS[task]
        variant = self.presets[preset] if preset else None
        return CommandLine(
            groups=(
                *shared.option_groups[:2],
                *self.option_groups,
                *self.task_option_groups.get(task, ()),
                *(variant.option_groups if variant else ()),
                *shared.option_groups[2:],
            ),
            description=shared.title.format(self.title),
            defaults={**shared.defaults, **self.defaults, **self.task_defaults.get(task, {})},
            hidden=shared.hidden
            | self.hidden
            | self.task_hidden.get(task, frozenset())
            | (variant.hidden if variant else frozenset()),
            choices={**shared.choices, **self.choices, **self.task_choices.get(task, {})},
        )

    def tracker_name(self, task: str, options: OptionSet) -> str:
        """Project name in trackers when the user names none."""
        preset = options.get(Preset)
        return preset.tracker_name if preset else self.tracker_names[task]
