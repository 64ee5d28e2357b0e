"""From options to a session: the only place where the parts are wired together."""

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import metadata as package_metadata
from pathlib import Path

import torch
from torch import Tensor

from library.base.dtypes import dtype_from_name
from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.randomness import address, seeded_globals
from library.batch import ItemAddress, StepInputs
from library.caching.latents import cache_latents
from library.caching.text_outputs import cache_text_outputs
from library.checkpoint.metadata import ModelHashes, TrainingFacts, minimum_metadata, training_metadata
from library.checkpoint.model_spec import model_spec_metadata
from library.checkpoint.saver import Saver
from library.data.dataset import TrainDataset
from library.data.loader import TrainData
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
from library.options.memory import MemoryOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.validation import ValidationOptions
from library.sampling.runner import SampleRunner, SampleTarget
from library.strategy_base import Strategies
from library.tracking.events import EventLog
from library.training.checks import Inspected
from library.training.conditioning import ConditioningSource
from library.training.distributed import Processes
from library.training.engine import Trainer
from library.training.inputs import StepAssembler
from library.training.latents import LatentEncoder, LatentSource
from library.training.network_adapter import KohyaNetworkAdapter, merge_base_weights
from library.training.plan import RunPlan
from library.training.replay import Replay, StepRecorder
from library.training.report import Progress
from library.training.services import SamplingService, SavingService, Service, ServiceList, ValidationService
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


def load(setting: Setting) -> Components:
    """Load the model, frozen, and merge `--base_weights` into it."""
    plan = setting.plan
    options = plan.options
    # text encoders and VAE may leave the device after caching, so the denoiser comes there only then
    waiting = torch.device("cpu") if plan.cache_latents or plan.cache_text else None
    need = Need(dtype=plan.dtype, vae_dtype=plan.vae_dtype, device=setting.device, denoiser_device=waiting)
    components: Components = resolve(setting.family.load)(options, need)
    components.freeze()
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


def make_autocast(setting: Setting) -> Autocast:
    """The context that models compute in."""
    if setting.plan.dtype == torch.float32:
        return contextlib.nullcontext
    return partial(torch.autocast, setting.device.type, setting.plan.dtype)


def make_conditioning(
    setting: Setting, components: Components, trained: list[bool], autocast: Autocast, recorded: Sequence[str] | None
) -> ConditioningSource:
    """Text conditioning, cached where asked for; encoders that are not needed any more are let go."""
    source = ConditioningSource(setting.strategies, components.text_encoders, trained, None, setting.device, autocast)
    if not setting.plan.cache_text:
        return source
    rest = [None if on else encoder for encoder, on in zip(components.text_encoders, trained)]
    dataset = setting.plan.dataset()
    # a replay trains on the captions of its record, whatever the files say now
    texts = list(recorded) if recorded is not None else _captions(dataset)
    texts += _captions(setting.plan.dataset(validation=True))
    texts += [text for request in setting.inspected.requests for text in (request.prompt, request.negative)]
    size = setting.plan.options[TextCachingOptions].text_encoder_batch_size or dataset.sets[0].plan.batch_size
    source.cached = cache_text_outputs(
        texts, lambda chunk: source.encode(chunk, rest), batch_size=size, show_progress=setting.processes.is_main
    )
    for index, on in enumerate(trained):
        if not on:
            components.text_encoders[index] = source.encoders[index] = None
            components.published_text_encoders[index] = None
    return source


def _captions(data: TrainDataset) -> list[str]:
    """Texts of all images, which do not change from visit to visit when they are cached."""
    return [
        data.caption(ItemAddress(number, record.subset, index, record.key, 0, 0), 0)
        for number, images in enumerate(data.sets)
        for index, record in enumerate(images.records)
    ]


def make_latents(setting: Setting, components: Components) -> tuple[LatentSource, LatentSource]:
    """Latents for training and for validation, cached where asked for."""
    plan, denoising = setting.plan, setting.strategies.denoising
    assert components.vae is not None
    caching = plan.options[CachingOptions]
    encoder = LatentEncoder(
        setting.strategies.latents_caching,
        components.vae,
        channels=denoising.latent_channels,
        factor=denoising.spatial_factor,
        sample_seed=plan.seed if caching.vae_sample else None,
        chunk=caching.vae_batch_size,
    )
    if not plan.cache_latents:
        return LatentSource(None, encoder), LatentSource(None, encoder)
    sources = [
        LatentSource(
            cache_latents(
                plan.dataset(validation=validation),
                encoder,
                batch_size=caching.vae_batch_size,
                show_progress=setting.processes.is_main and bool(plan.dataset(validation=validation).sets),
            ),
            None,
        )
        for validation in (False, True)
    ]
    components.vae.to("cpu")
    if not setting.inspected.requests:
        components.vae = None
    return sources[0], sources[1]


def bring_denoiser(setting: Setting, components: Components) -> None:
    """Move the denoiser to the device, into the memory that text encoders and VAE left."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    assert components.denoiser is not None
    components.denoiser.to(setting.device)


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

    def __init__(self, setting: Setting, task: NetworkTask, optimizer: OptimizerDriver) -> None:
        plan, options = setting.plan, setting.plan.options
        self.started = time.time()
        self.setting = setting
        self.without = options[MetadataOptions].no_metadata
        model = options[ModelOptions]
        self.hashes = ModelHashes({"sd_model": model.pretrained_model_name_or_path, "vae": model.vae})
        commit = program_version()
        given = options[NetworkOptions].network_args
        facts = TrainingFacts(
            session_id=address(int(self.started * 1000), "session") % 2**32,
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
        writer = MetadataWriter(setting, task, optimizer)

        def write(path: Path, step: int, epoch: int) -> None:
            task.save(path, writer.describe(step, epoch))
            progress.events.write("saved", path=str(path), step=step, epoch=epoch)
            progress.say(f"saved {path}")

        saver = Saver(options[SavingOptions], plan.names, plan.num_epochs, write)
        services.append(SavingService(saver))
    return ServiceList(services), saver, runner


def add_validation(
    setting: Setting, session: Session, latents: LatentSource, losses: Callable[[StepInputs], Tensor]
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
        plan.dataset(validation=True),
        StepAssembler(setting.strategies.denoising, latents, seed, setting.device),
        losses,
        setting.processes,
        (low or 0, 1000 if high is None else high),
    )
    service = ValidationService(
        validator, session.progress, session.task.evaluating, at_first=options.validate_at_first
    )
    session.services.services.append(service)


def make_recorder(setting: Setting) -> StepRecorder | None:
    """The recorder of `--record_steps`."""
    folder = setting.plan.options[RecordOptions].record_steps
    if not folder:
        return None
    if setting.processes.world_size > 1:
        raise UserError("--record_steps", folder, "works with one process; launch with --num_processes 1")
    meta = {
        "family": setting.family.name,
        "task": setting.task_name,
        "seed": setting.plan.seed,
        "dtype": str(setting.plan.dtype).removeprefix("torch."),
        "versions": {name: package_metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }
    return StepRecorder(folder, meta)


def build_session(
    setting: Setting, replay: Replay | None, events: EventLog, track: Callable[[dict[str, float], int], None]
) -> tuple[Session, Saver | None]:
    """Load, cache, wrap and wire everything."""
    plan = setting.plan
    components = load(setting)
    autocast = make_autocast(setting)
    task = make_network(setting, components)
    options = plan.options[NetworkOptions]
    trained = [False] * len(components.text_encoders)
    if not options.network_train_unet_only:
        trained = setting.strategies.text_encoding.trained_encoders(components.text_encoders, task.adapter.network)
    if replay is None:
        latents, held_out = make_latents(setting, components)
    else:
        latents = held_out = LatentSource(None, None)
    conditioning = make_conditioning(setting, components, trained, autocast, replay and replay.captions())
    bring_denoiser(setting, components)
    wrap_blocks(setting, components, trained)
    optimizer = make_optimizer(setting, task)
    # the schedule spans --max_train_steps; a replay ends where its record does
    state = TrainState(max_steps=min(plan.max_steps, replay.steps_per_epoch) if replay else plan.max_steps)
    progress = Progress(plan, state, setting.device, events, track, show=setting.processes.is_main)
    services, saver, _ = make_services(setting, components, task, conditioning, autocast, optimizer, progress)
    data = replay or TrainData(
        plan.dataset(),
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
        inputs=replay or StepAssembler(setting.strategies.denoising, latents, plan.seed, setting.device),
        conditioning=conditioning,
        optimizer=optimizer,
        progress=progress,
        services=services,
        recorder=make_recorder(setting),
        autocast=autocast,
    )
    if replay is None:
        add_validation(setting, session, held_out, Trainer(session).losses)
    return session, saver
