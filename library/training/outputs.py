"""What a run leaves behind, and what happens beside its steps: results, states, samples, validation, records."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from library.base.errors import UserError
from library.base.lazy import resolve
from library.batch import StepInputs
from library.checkpoint.metadata import ModelHashes, TrainingFacts, minimum_metadata, training_metadata
from library.checkpoint.model_spec import model_spec_metadata
from library.checkpoint.saver import Saver, averaged
from library.checkpoint.state_files import SavedState, write_state
from library.diffusion.from_options import noise_recipe
from library.modules.components import Components
from library.modules.dialects import Exporter
from library.optim.driver import OptimizerDriver
from library.options.debug import RecordOptions
from library.options.hub import HubOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.validation import ValidationOptions
from library.sampling.prompts import SampleRequest
from library.sampling.runner import ImageModel, OnImage, SampleRunner, SampleTarget
from library.tracking.trackers import Moment
from library.training.conditioning import ConditioningSource
from library.training.inputs import StepAssembler
from library.training.latents import LatentSource
from library.training.readable import Readable
from library.training.replay import StepRecorder
from library.training.report import Progress
from library.training.resume import model_identity
from library.training.services import (
    SamplingService,
    SavingService,
    Service,
    ServiceList,
    ValidationService,
)
from library.training.session import Session
from library.training.setting import Autocast, Setting, Start
from library.training.state import TrainState
from library.training.tasks.network import NetworkTask
from library.training.validation import Validator
from library.training.weights import TrainedWeights


class MetadataWriter:
    """Metadata of saved files: what was known at the start, and what each save adds."""

    def __init__(
        self, setting: Setting, task: NetworkTask, optimizer: OptimizerDriver, identity: Mapping[str, Any]
    ) -> None:
        plan, options = setting.plan, setting.plan.options
        self.started = identity["started_at"]
        self.setting = setting
        self.without = options[MetadataOptions].no_metadata
        model = options[ModelOptions]
        self.hashes = ModelHashes({"sd_model": model.pretrained_model_name_or_path, "vae": model.vae})
        commit = program_version()
        given = options[NetworkOptions].network_args
        facts = TrainingFacts(
            session_id=identity["session_id"],
            started_at=self.started,
            seed=plan.seed,
            network_module=task.adapter.module_name,
            network_args=task.adapter.arguments if given else None,
            base_model_version=plan.variant.base_model_version,
            optimizer=optimizer.description,
            num_batches=-(-plan.num_batches // plan.world_size),
            num_epochs=plan.num_epochs,
            max_steps=plan.max_steps,
            sets=plan.images.train,
            num_validation_images=sum(len(images.records) for images in plan.images.validation),
            commit=commit,
        )
        self.base = training_metadata(options, facts, setting.family.metadata_keys)
        self.version = commit

    def describe(self, step: int, epoch: int) -> dict[str, str]:
        """Metadata of a file saved now."""
        plan = self.setting.plan
        options = plan.options
        entries = minimum_metadata(self.base)
        if not self.without:
            ended = {"ss_training_finished_at": str(time.time()), "ss_steps": str(step), "ss_epoch": str(epoch)}
            entries = {**self.base, **self.hashes.metadata(), **ended}
        values = options.values()
        low, high = values.get("min_timestep"), values.get("max_timestep")
        ranged = low is not None or high is not None
        resolution = "x".join(map(str, plan.images.train[0].plan.resolution))
        spec = model_spec_metadata(
            options[MetadataOptions],
            resolve(self.setting.family.model_spec)(plan.variant),
            suffix="/lora",
            title=plan.names.base or plan.names.final().stem,
            resolution=resolution,
            version=self.version,
            extra={
                "timestep_range": f"{low or 0},{1000 if high is None else high}" if ranged else None,
                "encoder_layer": values.get("clip_skip"),
            },
        )
        return {**entries, **spec}


def program_version() -> str:
    """Version of the installed package; of a checkout that is not installed, a word that says so."""
    try:
        return package_metadata.version("diffusion-scripts")
    except package_metadata.PackageNotFoundError:
        return "checkout"


def make_runner(
    setting: Setting,
    components: Components,
    conditioning: ConditioningSource,
    autocast: Autocast,
    on_image: OnImage | None = None,
) -> SampleRunner:
    """What makes the sample images of a run."""
    plan, processes = setting.plan, setting.processes
    assert components.denoiser is not None and components.vae is not None
    return SampleRunner(
        ImageModel(
            maker=setting.strategies.denoising,
            denoiser=components.denoiser,
            vae=components.vae,
            condition=conditioning.for_prompt,
            device=setting.device,
            autocast=autocast,
        ),
        setting.inspected.requests,
        SampleTarget(
            folder=plan.names.folder / "sample",
            output_name=plan.options[SavingOptions].output_name,
            model=components.source.stem,
            seed=plan.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            wait_for_all=processes.wait_for_all,
        ),
        on_image,
    )


def _tracker_hook(setting: Setting, weights: TrainedWeights, state: TrainState) -> OnImage | None:
    """Shows sample images to the trackers; where several kinds of weights are looked at, those of the first kind."""
    trackers = setting.trackers
    if not trackers:
        return None
    others = tuple(f"_{kind}" for kind in weights.looked_at[1:])

    def show(path: Path, request: SampleRequest, occasion: str) -> None:
        if not occasion.endswith(others):
            trackers.image(path, request.prompt, request.index, Moment(state.step, state.epoch))

    return show


def make_services(
    setting: Setting,
    components: Components,
    task: NetworkTask,
    conditioning: ConditioningSource,
    autocast: Autocast,
    weights: TrainedWeights,
    progress: Progress,
    start: Start,
) -> tuple[ServiceList, Saver | None, SampleRunner | None]:
    """Samples, then saving; validation is added when the session can compute losses."""
    services: list[Service] = []
    plan, options = setting.plan, setting.plan.options
    runner = None
    if setting.inspected.requests:
        runner = make_runner(setting, components, conditioning, autocast, _tracker_hook(setting, weights, start.state))
        services.append(SamplingService(options[SamplingOptions], runner, weights))
    saver = None
    if setting.processes.is_main:
        writer = MetadataWriter(setting, task, weights.optimizer, start.identity)
        dialects = options[NetworkOptions].dialects
        exporter = make_exporter(setting, components, task) if dialects else None

        def write(path: Path, step: int, epoch: int) -> None:
            metadata = writer.describe(step, epoch)
            written = [path]
            with weights.shown():
                task.save(path, metadata)
            if weights.average is not None:
                written.append(averaged(path))
                with weights.shown("ema"):
                    task.save(written[-1], {**metadata, "ss_ema_decay": str(weights.average.decay)})
            if exporter is not None:
                written += [other for one in written for other in exporter.export(one, dialects)]
            progress.events.write("saved", path=str(path), step=step, epoch=epoch)
            progress.say(f"saved {path}")
            if setting.uploader is not None:
                for one in written:
                    setting.uploader.add(one)

        saver = Saver(options[SavingOptions], plan.names, plan.num_epochs, write, dialects)
        services.append(SavingService(saver))
    return ServiceList(services), saver, runner


def make_exporter(setting: Setting, components: Components, task: NetworkTask) -> Exporter:
    """What writes adapters in the names of other programs.

    Raises:
        UserError: the network cannot be written so.
    """
    exporter = Exporter(setting.family.exports, components)
    exporter.check(task.weights(), setting.plan.options[NetworkOptions].dialects)
    return exporter


def make_assembler(setting: Setting, latents: LatentSource, seed: int, options: NoiseOptions) -> StepAssembler:
    """What makes the inputs of steps from their batches."""
    return StepAssembler(
        setting.strategies.denoising,
        latents,
        seed,
        setting.device,
        noise_recipe(options),
        options.num_timestep_buckets,
    )


def add_validation(
    setting: Setting,
    session: Session,
    readable: Readable,
    losses: Callable[[StepInputs], Tensor],
    saver: Saver | None,
) -> None:
    """Put validation among the services when images are held out."""
    plan, options = setting.plan, setting.plan.options[ValidationOptions]
    if not plan.images.validation:
        return
    values = plan.options.values()
    low, high = values.get("min_timestep"), values.get("max_timestep")
    seed = plan.seed if options.validation_seed is None else options.validation_seed
    validator = Validator(
        options,
        readable.validation,
        make_assembler(setting, readable.latents, seed, replace(plan.options[NoiseOptions], num_timestep_buckets=None)),
        losses,
        setting.processes,
        (low or 0, 1000 if high is None else high),
    )
    service = ValidationService(
        validator,
        session.progress,
        session.weights,
        at_first=options.validate_at_first,
        saver=saver if options.save_best else None,
    )
    session.services.services.append(service)


def record_meta(setting: Setting) -> dict[str, Any]:
    """What a record says of its run."""
    return {
        "family": setting.family.name,
        "task": setting.task_name,
        "seed": setting.plan.seed,
        "dtype": str(setting.plan.dtype).removeprefix("torch."),
        "versions": {name: package_metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def make_recorder(setting: Setting, keep: int | None) -> StepRecorder | None:
    """The recorder of `--record_steps`.

    Args:
        setting: of the run.
        keep: micro-steps of an earlier run that stay; None begins a record.
    """
    folder = setting.plan.options[RecordOptions].record_steps
    if not folder:
        return None
    if setting.processes.world_size > 1:
        raise UserError("--record_steps", folder, "works with one process; launch with --num_processes 1")
    return StepRecorder(folder, record_meta(setting), keep)


class StateWriter:
    """Writes training states of a run.

    Args:
        setting: of the run.
        identity: what states say of the run they belong to.
        state: where the run is.
        task: what is trained.
        weights: the trained ones, with their optimizer and average.
        progress: averages that go on.
    """

    def __init__(
        self,
        setting: Setting,
        identity: Mapping[str, Any],
        state: TrainState,
        task: NetworkTask,
        weights: TrainedWeights,
        progress: Progress,
    ) -> None:
        self.setting = setting
        self.identity = dict(identity)
        self.state = state
        self.task = task
        self.weights = weights
        self.progress = progress

    def write(self, folder: Path, step: int, epoch: int) -> None:
        """Write the state of now."""
        counters = {name: getattr(self.state, name) for name in ("step", "micro_step", "epoch", "batch_in_epoch")}
        if "base_model" not in self.identity:
            self.identity["base_model"] = model_identity(self.setting.plan.options)
        self.progress.flush()
        head = {
            **self.identity,
            **counters,
            "max_steps": self.state.max_steps,
            "average": self.progress.average.state(),
            "saved_at": time.time(),
        }
        optimizer = {**self.weights.optimizer.state(), "average": self.weights.state()}
        write_state(folder, SavedState(head, self.task.weights(), optimizer))
        self.progress.events.write("state", path=str(folder), step=step, epoch=epoch)
        self.progress.say(f"saved the state {folder}")
        if self.setting.uploader is not None and self.setting.plan.options[HubOptions].save_state_to_huggingface:
            self.setting.uploader.add(folder)
