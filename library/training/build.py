"""From options to a session: the only place where the parts are wired together."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.dtypes import dtype_from_name
from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.randomness import address, seeded_globals
from library.batch import Conditioning, StepInputs
from library.caching.latents import all_items
from library.caching.text_outputs import cache_text_outputs
from library.checkpoint.metadata import ModelHashes, TrainingFacts, minimum_metadata, training_metadata
from library.checkpoint.model_spec import model_spec_metadata
from library.checkpoint.saver import Saver, StateSaver
from library.checkpoint.state_files import SavedState, write_state
from library.data.dataset import LatentReader, TextReader, TrainDataset
from library.data.loader import TrainData
from library.diffusion.from_options import noise_recipe, sample_loss
from library.family import Family
from library.modules.checkpointing import checkpointed
from library.modules.compiling import compile_blocks
from library.modules.components import Components, Need
from library.optim.driver import OptimizerDriver
from library.optim.registry import build_optimizer
from library.optim.schedulers import build_schedule
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.compiling import CompileOptions
from library.options.debug import RecordOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.state import StateOptions
from library.options.validation import ValidationOptions
from library.sampling.runner import SampleRunner, SampleTarget
from library.strategy_base import Strategies
from library.tracking.events import EventLog
from library.training.caches import CacheSetting, DiskCaches, keeps_texts_on_disk, memory_latents
from library.training.checks import Inspected
from library.training.conditioning import ConditioningSource, encode_with_all
from library.training.control import Control
from library.training.distributed import Processes
from library.training.engine import Trainer
from library.training.inputs import StepAssembler
from library.training.latents import LatentEncoder, LatentSource
from library.training.network_adapter import (
    KohyaNetworkAdapter,
    import_network_module,
    is_ours,
    merge_base_weights,
)
from library.training.plan import RunPlan, autocast_context
from library.training.replay import FailureWriter, Replay, StepRecorder
from library.training.report import Progress
from library.training.resume import Resume, load_state, model_identity, restore, state_names
from library.training.services import (
    SamplingService,
    SavingService,
    Service,
    ServiceList,
    StateService,
    ValidationService,
)
from library.training.session import Session
from library.training.state import TrainState
from library.training.tasks.network import NetworkTask
from library.training.validation import Validator

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every building step looks at."""

    family: Family
    task_name: str
    plan: RunPlan
    inspected: Inspected
    processes: Processes

    @property
    def strategies(self) -> Strategies:
        """Of the family."""
        return self.inspected.strategies

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.processes.device

    def caches(self) -> CacheSetting:
        """What decides how caches are made."""
        return CacheSetting(
            family=self.family,
            options=self.plan.options,
            strategies=self.strategies,
            processes=self.processes,
            seed=self.plan.seed,
        )


def needed(setting: Setting, caches: DiskCaches | None, *, replayed: bool) -> Need:
    """Which parts the run has to load: what complete caches stand for stays on disk.

    Args:
        setting: of the run.
        caches: on disk; None when the run keeps none.
        replayed: latents come from a record.
    """
    plan, options = setting.plan, setting.plan.options
    network = options[NetworkOptions]
    samples = bool(setting.inspected.requests)
    latents_ready = replayed or (caches is not None and caches.latents is not None and not caches.lacks_latents)
    texts_ready = caches is not None and caches.texts is not None and not caches.lacks_texts
    module = import_network_module(network.network_module or setting.family.default_network or "")
    changes_text = not network.network_train_unet_only or bool(network.base_weights) or not is_ours(module)
    # text encoders and VAE may leave the device after caching, so the denoiser comes there only then
    waiting = torch.device("cpu") if plan.cache_latents or plan.cache_text else None
    return Need(
        vae=samples or not latents_ready,
        text_encoders=samples or not texts_ready or changes_text,
        dtype=plan.dtype,
        vae_dtype=plan.vae_dtype,
        device=setting.device,
        denoiser_device=waiting,
    )


def load(setting: Setting, need: Need) -> Components:
    """Load the model, frozen, and merge `--base_weights` into it."""
    plan = setting.plan
    options = plan.options
    components: Components = resolve(setting.family.load)(options, need)
    components.freeze()
    if need.text_encoders:
        setting.strategies.tokenize.check_vocabularies(components.text_encoders)
    if options[NetworkOptions].base_weights:
        merge_base_weights(options[NetworkOptions], components, setting.family.default_network, plan.dtype)
    return components


def make_network(setting: Setting, components: Components) -> NetworkTask:
    """Create the adapter, install it, load its start weights."""
    options = setting.plan.options
    network = options[NetworkOptions]
    with seeded_globals(address(setting.plan.seed, "network")):
        adapter = KohyaNetworkAdapter.create(network, components, setting.family.default_network)
    adapter.prepare(options.namespace())
    adapter.apply(
        components,
        text_encoders=not network.network_train_unet_only,
        denoiser=not network.network_train_text_encoder_only,
    )
    if network.network_weights:
        adapter.load(network.network_weights)
    adapter.network.to(setting.device)
    setting.processes.broadcast(list(adapter.network.parameters()))
    return NetworkTask(
        network,
        components,
        setting.strategies,
        adapter,
        learning_rate=options[OptimizerOptions].learning_rate,
        save_dtype=dtype_from_name(options[SavingOptions].save_precision),
        device=setting.device,
    )


def wrap_blocks(setting: Setting, components: Components, trained: list[bool]) -> None:
    """Checkpointing, then compiling: the order in which wrappers have to come."""
    options = setting.plan.options
    denoising, text = setting.strategies.denoising, setting.strategies.text_encoding
    assert components.denoiser is not None
    blocks = denoising.blocks(components.denoiser)
    if options[MemoryOptions].gradient_checkpointing:
        encoders = [e for e, on in zip(components.text_encoders, trained) if on and e is not None]
        for block in (*blocks, *(block for encoder in encoders for block in text.blocks(encoder))):
            checkpointed(block, in_eval=True)
    compiling = options[CompileOptions]
    if compiling.compile:
        dynamic = {None: None, "auto": None, "true": True, "false": False}[compiling.compile_dynamic]
        compile_blocks(
            blocks,
            backend=compiling.compile_backend,
            mode=None if compiling.compile_mode == "default" else compiling.compile_mode,
            dynamic=dynamic,
            fullgraph=compiling.compile_fullgraph,
            grad_inputs=denoising.gradient_inputs,
            **({"cache_size_limit": compiling.compile_cache_size_limit} if compiling.compile_cache_size_limit else {}),
        )


@dataclass(frozen=True)
class Readable:
    """Data that is ready to be read: what is cached is cached.

    Attributes:
        train: images to train on.
        validation: images to validate on.
        latents: gives the latents of their batches.
        texts: conditioning of single captions, or None where encoders stay.
        prompts: the same of the prompts of sample images.
    """

    train: TrainDataset
    validation: TrainDataset
    latents: LatentSource
    texts: Mapping[str, Conditioning] | None
    prompts: Mapping[str, Conditioning] | None


def make_disk_caches(setting: Setting) -> DiskCaches | None:
    """Look at the caches on disk, if the run keeps any."""
    plan, options = setting.plan, setting.plan.options
    latents = options[CachingOptions].cache_latents_to_disk
    texts = keeps_texts_on_disk(options)
    if not latents and not texts:
        return None
    return DiskCaches(setting.caches(), plan.dataset(), plan.dataset(validation=True), latents=latents, texts=texts)


def fill_caches(
    setting: Setting,
    components: Components,
    caches: DiskCaches | None,
    autocast: Autocast,
    replay: Replay | None,
) -> Readable:
    """Encode images and captions where they are cached; nothing is trained yet, so no adapter has a part in it."""
    plan = setting.plan
    caching = plan.options[CachingOptions]
    encoder = None
    if components.vae is not None:
        encoder = LatentEncoder.for_run(setting.strategies, components.vae, caching, plan.seed)
    latents: list[LatentReader | None] = [None, None]
    texts: list[TextReader | None] = [None, None]
    if caches is not None:
        caches.fill_latents(encoder)
        encode = encode_with_all(setting.strategies, components.text_encoders, setting.device, autocast)
        caches.fill_texts(encode if components.has_text_encoders else None, text_batch_size(setting))
        latents, texts = map(list, zip(*caches.readers()))
    if plan.cache_latents and latents[0] is None and replay is None:
        assert encoder is not None
        datasets = plan.dataset(), plan.dataset(validation=True)
        latents = list(memory_latents(setting.caches(), datasets, encoder))
    if plan.cache_latents or replay is not None:
        encoder = None
        if components.vae is not None:
            components.vae.to("cpu")
        if not setting.inspected.requests:
            components.vae = None
    return Readable(
        plan.dataset(latents=latents[0], texts=texts[0]),
        plan.dataset(validation=True, latents=latents[1], texts=texts[1]),
        LatentSource(encoder),
        _texts_in_memory(setting, components, autocast, replay, on_disk=texts[0] is not None),
        _prompts_in_memory(setting, components, autocast),
    )


def text_batch_size(setting: Setting) -> int:
    """Captions per call of the text encoders."""
    text = setting.plan.options.get(TextCachingOptions)
    given = text.text_encoder_batch_size if text is not None else None
    return given or setting.plan.images.train[0].plan.batch_size


def _texts_in_memory(
    setting: Setting, components: Components, autocast: Autocast, replay: Replay | None, *, on_disk: bool
) -> Mapping[str, Conditioning] | None:
    """Conditioning of captions; empty where files hold them."""
    if not setting.plan.cache_text:
        return None
    texts: list[str] = []
    if not on_disk:
        dataset, held_out = setting.plan.dataset(), setting.plan.dataset(validation=True)
        # a replay trains on the captions of its record, whatever the files say now
        texts = replay.captions() if replay is not None else _captions(dataset)
        texts += _captions(held_out)
    return cache_text_outputs(
        texts,
        encode_with_all(setting.strategies, components.text_encoders, setting.device, autocast),
        batch_size=text_batch_size(setting),
        show_progress=setting.processes.is_main,
    )


def _prompts_in_memory(
    setting: Setting, components: Components, autocast: Autocast
) -> Mapping[str, Conditioning] | None:
    """Conditioning of sample prompts, where text encoders leave after caching."""
    if not setting.plan.cache_text or not setting.inspected.requests:
        return None
    encoders = components.text_encoders
    source = ConditioningSource(setting.strategies, encoders, [False] * len(encoders), None, setting.device, autocast)
    texts = {text for request in setting.inspected.requests for text in (request.prompt, request.negative)}
    return {text: source.for_prompt(text).to(torch.device("cpu")) for text in sorted(texts)}


def _captions(data: TrainDataset) -> list[str]:
    """Every text that an image may get when texts are cached."""
    return [text for item in all_items(data) for text in data.texts(item)]


def make_conditioning(
    setting: Setting,
    components: Components,
    trained: list[bool],
    autocast: Autocast,
    readable: Readable,
) -> ConditioningSource:
    """Text conditioning; encoders that are not needed any more are let go."""
    encoders = components.text_encoders
    if readable.texts is not None:
        for index, on in enumerate(trained):
            if not on:
                encoders[index] = components.published_text_encoders[index] = None
    return ConditioningSource(
        setting.strategies, encoders, trained, readable.texts, setting.device, autocast, readable.prompts
    )


def bring_denoiser(setting: Setting, components: Components) -> None:
    """Move the denoiser to the device, into the memory that text encoders and VAE left."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    assert components.denoiser is not None
    components.denoiser.to(setting.device)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        state: counters.
        resume: the state it goes on from.
        identity: what states of the run say of it.
        keep_record: micro-steps of an earlier record that stay; None begins a new one.
    """

    state: TrainState
    resume: Resume | None
    identity: Mapping[str, Any]
    keep_record: int | None


def make_control(setting: Setting, state: TrainState, progress: Progress) -> Control:
    """What hears signals, stdin and the control file."""
    options, processes = setting.plan.options, setting.processes
    if options[StateOptions].interactive and processes.world_size > 1:
        raise UserError("--interactive", message="works with one process; use the control file with several")
    return Control(
        setting.plan.names.beside(".control"),
        interactive=options[StateOptions].interactive,
        is_main=processes.is_main,
        status=lambda: f"step {state.step} of {state.max_steps}, epoch {state.epoch}, {progress.status()}",
    )


def make_optimizer(setting: Setting, task: NetworkTask) -> OptimizerDriver:
    """Optimizer, schedule and clipping."""
    options = setting.plan.options
    groups, names = task.param_groups()
    optimizer = options[OptimizerOptions]
    fp16 = setting.plan.dtype == torch.float16
    return OptimizerDriver(
        build_optimizer(optimizer, groups),
        build_schedule(options[ScheduleOptions], setting.plan.max_steps),
        [parameter for group in groups for parameter in group["params"]],
        max_grad_norm=optimizer.max_grad_norm,
        scaler=torch.amp.GradScaler(setting.device.type) if fp16 else None,
        names=names,
    )


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


def make_services(
    setting: Setting,
    components: Components,
    task: NetworkTask,
    conditioning: ConditioningSource,
    autocast: Autocast,
    optimizer: OptimizerDriver,
    progress: Progress,
    start: Start,
) -> tuple[ServiceList, Saver | None, SampleRunner | None]:
    """Samples, then saving; validation is added when the session can compute losses."""
    services: list[Service] = []
    plan, options = setting.plan, setting.plan.options
    runner = None
    if setting.inspected.requests:
        assert components.denoiser is not None and components.vae is not None
        runner = SampleRunner(
            setting.strategies.denoising,
            components.denoiser,
            components.vae,
            conditioning.for_prompt,
            setting.inspected.requests[setting.processes.rank :: setting.processes.world_size],
            SampleTarget(
                folder=plan.names.folder / "sample",
                output_name=options[SavingOptions].output_name,
                seed=plan.seed,
                device=setting.device,
            ),
            autocast,
        )
        services.append(SamplingService(options[SamplingOptions], runner, task.evaluating))
    saver = None
    if setting.processes.is_main:
        writer = MetadataWriter(setting, task, optimizer, start.identity)

        def write(path: Path, step: int, epoch: int) -> None:
            task.save(path, writer.describe(step, epoch))
            progress.events.write("saved", path=str(path), step=step, epoch=epoch)
            progress.say(f"saved {path}")

        saver = Saver(options[SavingOptions], plan.names, plan.num_epochs, write)
        services.append(SavingService(saver))
    return ServiceList(services), saver, runner


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
    setting: Setting, session: Session, readable: Readable, losses: Callable[[StepInputs], Tensor]
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
        validator, session.progress, session.task.evaluating, at_first=options.validate_at_first
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
        optimizer: how.
        progress: averages that go on.
    """

    def __init__(
        self,
        setting: Setting,
        identity: Mapping[str, Any],
        state: TrainState,
        task: NetworkTask,
        optimizer: OptimizerDriver,
        progress: Progress,
    ) -> None:
        self.setting = setting
        self.identity = dict(identity)
        self.state = state
        self.task = task
        self.optimizer = optimizer
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
        write_state(folder, SavedState(head, self.task.weights(), self.optimizer.state()))
        self.progress.events.write("state", path=str(folder), step=step, epoch=epoch)
        self.progress.say(f"saved the state {folder}")


def build_session(
    setting: Setting,
    replay: Replay | None,
    events: EventLog,
    track: Callable[[dict[str, float], int], None],
    start: Start,
) -> tuple[Session, Saver | None]:
    """Load, cache, wrap and wire everything; `start` says where the run begins."""
    plan = setting.plan
    caches = make_disk_caches(setting) if replay is None else None
    components = load(setting, needed(setting, caches, replayed=replay is not None))
    autocast = autocast_context(setting.device, plan.dtype)
    readable = fill_caches(setting, components, caches, autocast, replay)
    task = make_network(setting, components)
    options = plan.options[NetworkOptions]
    trained = [False] * len(components.text_encoders)
    if not options.network_train_unet_only:
        trained = setting.strategies.text_encoding.trained_encoders(components.text_encoders, task.adapter.network)
    conditioning = make_conditioning(setting, components, trained, autocast, readable)
    bring_denoiser(setting, components)
    wrap_blocks(setting, components, trained)
    optimizer = make_optimizer(setting, task)
    # the schedule spans --max_train_steps; a replay ends where its record does
    state = start.state
    if replay:
        state.max_steps = min(plan.max_steps, replay.steps_per_epoch)
    if start.resume is not None:
        restore(load_state(start.resume.folder), task.adapter.network, optimizer, start.resume.folder, state.step)
    else:
        optimizer.go_to(state.step)
    progress = Progress(plan, state, setting.device, events, track, show=setting.processes.is_main)
    if start.resume is not None:
        progress.go_on(start.resume.head.get("average", ()))
    services, saver, _ = make_services(setting, components, task, conditioning, autocast, optimizer, progress, start)
    data = replay or TrainData(
        readable.train,
        accumulation=plan.accumulation,
        world_size=plan.world_size,
        rank=setting.processes.rank,
        workers=plan.workers,
    )
    session = Session(
        plan=plan,
        state=state,
        processes=setting.processes,
        components=components,
        strategies=setting.strategies,
        task=task,
        data=data,
        inputs=replay or make_assembler(setting, readable.latents, plan.seed, plan.options[NoiseOptions]),
        criterion=sample_loss(plan.options[LossOptions], setting.strategies.denoising.process),
        conditioning=conditioning,
        optimizer=optimizer,
        progress=progress,
        services=services,
        recorder=make_recorder(setting, start.keep_record),
        control=make_control(setting, state, progress),
        failures=FailureWriter(plan.names.beside("_nan_step"), record_meta(setting)),
        autocast=autocast,
    )
    if replay is None:
        add_validation(setting, session, readable, Trainer(session).losses)
    if saver is not None:
        writer = StateWriter(setting, start.identity, state, task, optimizer, progress)
        options = plan.options[StateOptions]
        names = state_names(plan.options)
        services.services.append(StateService(StateSaver(options, saver, names, writer.write, time.monotonic)))
    return session, saver
