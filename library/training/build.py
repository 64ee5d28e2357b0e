"""From options to a session: the only place where the parts are wired together."""

import time
from collections.abc import Callable

import torch

from library.base.dtypes import dtype_from_name
from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.randomness import address, seeded_globals
from library.checkpoint.saver import Saver, StateSaver
from library.data.loader import TrainData
from library.diffusion.from_options import sample_loss
from library.modules.attention import use_attention
from library.modules.checkpointing import checkpointed
from library.modules.compiling import compile_blocks
from library.modules.components import Components, Need
from library.modules.swapping import BlockSwapper
from library.optim.driver import OptimizerDriver
from library.optim.registry import build_optimizer
from library.optim.rounding import WideUpdates
from library.optim.scaler import HalfGradScaler
from library.optim.schedulers import build_schedule
from library.options.attention import chosen_back_end, splits_attention
from library.options.compiling import CompileOptions
from library.options.ema import EmaOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.state import StateOptions
from library.tracking.events import EventLog
from library.tracking.trackers import Moment
from library.training.caches import DiskCaches
from library.training.control import Control
from library.training.engine import Trainer
from library.training.network_adapter import (
    KohyaNetworkAdapter,
    import_network_module,
    is_ours,
    merge_base_weights,
)
from library.training.outputs import (
    StateWriter,
    add_validation,
    make_assembler,
    make_recorder,
    make_services,
    record_meta,
)
from library.training.plan import autocast_context, preparations
from library.training.readable import fill_caches, make_conditioning, make_disk_caches
from library.training.replay import FailureWriter, Replay
from library.training.report import Progress
from library.training.resume import load_state, restore, state_names
from library.training.services import (
    StateService,
)
from library.training.session import Session
from library.training.setting import Setting, Start
from library.training.state import TrainState
from library.training.tasks.network import NetworkTask
from library.training.weights import TrainedWeights

_SPLIT_MODE = 18  # blocks that an old flag stands for


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
        **preparations(options, setting.strategies),
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
    precision = options[PrecisionOptions]
    # half precision throughout: what is trained too, otherwise it stays in float32
    adapter.network.to(setting.device, setting.plan.dtype if precision.full_fp16 or precision.full_bf16 else None)
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
    memory = options[MemoryOptions]
    denoising, text = setting.strategies.denoising, setting.strategies.text_encoding
    assert components.denoiser is not None
    use_attention(components.denoiser, chosen_back_end(options)[1], by_image=splits_attention(options))
    blocks = denoising.blocks(components.denoiser)
    if memory.gradient_checkpointing:
        encoders = [e for e, on in zip(components.text_encoders, trained) if on and e is not None]
        for block in (*blocks, *(block for encoder in encoders for block in text.blocks(encoder))):
            checkpointed(block, in_eval=True, offload=memory.offloads_activations)
    compiling = options[CompileOptions]
    if compiling.torch_compile:
        components.denoiser.compile(backend=compiling.dynamo_backend)
    if compiling.compile:
        dynamic = {None: None, "auto": None, "true": True, "false": False}[compiling.compile_dynamic]
        compile_blocks(
            blocks,
            backend=compiling.compile_backend,
            mode=None if compiling.compile_mode == "default" else compiling.compile_mode,
            dynamic=dynamic,
            fullgraph=compiling.compile_fullgraph,
            grad_inputs=denoising.gradient_inputs,
            cache_size_limit=compiling.compile_cache_size_limit,
        )


def bring_denoiser(setting: Setting, components: Components) -> None:
    """Move the denoiser to the device, into the memory that text encoders and VAE left."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    assert components.denoiser is not None
    blocks = setting.strategies.denoising.blocks(components.denoiser)
    swapped = setting.plan.options[MemoryOptions].blocks_to_swap
    if swapped is None and setting.plan.options.values().get("split_mode"):
        swapped = min(_SPLIT_MODE, len(blocks))
    if swapped:  # the last wrapper: what waits in main memory leaves only empty tensors to be moved
        BlockSwapper(blocks, swapped, setting.device)
    components.denoiser.to(setting.device)


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
    optimizer, precision = options[OptimizerOptions], options[PrecisionOptions]
    parameters = [parameter for group in groups for parameter in group["params"]]
    fp16 = setting.plan.dtype == torch.float16
    return OptimizerDriver(
        build_optimizer(optimizer, groups),
        build_schedule(options[ScheduleOptions], setting.plan.max_steps, optimizer),
        parameters,
        max_grad_norm=optimizer.max_grad_norm,
        scaler=HalfGradScaler(setting.device.type) if fp16 else None,
        wide=WideUpdates(parameters, precision.bf16_update, setting.plan.seed) if precision.bf16_update else None,
        names=names,
    )


def build_session(
    setting: Setting,
    replay: Replay | None,
    events: EventLog,
    track: Callable[[dict[str, float], Moment], None],
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
    wrap_blocks(setting, components, trained)
    bring_denoiser(setting, components)
    optimizer = make_optimizer(setting, task)
    # the schedule spans --max_train_steps; a replay ends where its record does
    state = start.state
    if replay:
        state.max_steps = min(plan.max_steps, replay.steps_per_epoch)
    weights = TrainedWeights.of_run(task, optimizer, plan.options[EmaOptions], setting.device)
    if start.resume is not None:
        saved = load_state(start.resume.folder)
        restore(saved, task.adapter.network, optimizer, start.resume.folder, state.step)
        weights.restore((saved.optimizer or {}).get("average"))
    else:
        optimizer.go_to(state.step)
    progress = Progress(plan, state, setting.device, events, track, show=setting.processes.is_main)
    if start.resume is not None:
        progress.go_on(start.resume.head.get("average", ()))
    services, saver, _ = make_services(setting, components, task, conditioning, autocast, weights, progress, start)
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
        weights=weights,
        progress=progress,
        services=services,
        recorder=make_recorder(setting, start.keep_record),
        control=make_control(setting, state, progress),
        failures=FailureWriter(plan.names.beside("_nan_step"), record_meta(setting)),
        autocast=autocast,
    )
    if replay is None:
        add_validation(setting, session, readable, Trainer(session).losses, saver)
    if saver is not None:
        writer = StateWriter(setting, start.identity, state, task, weights, progress)
        options = plan.options[StateOptions]
        names = state_names(plan.options)
        services.services.append(StateService(StateSaver(options, saver, names, writer.write, time.monotonic)))
    return session, saver
