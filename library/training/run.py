"""One training run from checked options to its result."""

import errno
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from library.base.errors import UserError, raise_problems
from library.base.logs import logger
from library.base.randomness import address
from library.checkpoint.hub import Repository, Uploader, open_repository
from library.checkpoint.saver import Names
from library.checkpoint.state_files import recover, sweep_half_written
from library.data.sheets import debug_lines, debug_sheets
from library.diffusion.preview import plot_preview, preview_levels, preview_lines
from library.family import Family
from library.optim.fused import check_fused
from library.optim.schedulers import Schedule, build_schedule, rate_courses
from library.options.caching import CachingOptions
from library.options.config import ConfigOptions
from library.options.data import DataOptions
from library.options.debug import RecordOptions
from library.options.distributed import DistributedOptions
from library.options.flow import TimestepViewOptions
from library.options.hub import HubOptions
from library.options.memory import MemoryOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.saving import SavingOptions
from library.options.schedule import LengthOptions, ScheduleOptions
from library.options.schema import OptionSet
from library.options.state import StateOptions
from library.options.tracking import TrackingOptions
from library.tracking.events import EventLog
from library.tracking.recorded import privacy_notes
from library.tracking.trackers import Trackers, start_trackers
from library.training.build import build_session
from library.training.caches import keeps_texts_on_disk
from library.training.checks import Inspected, inspect_run
from library.training.control import Orders
from library.training.distributed import Processes, process_is_alive, start_processes
from library.training.engine import Trainer
from library.training.memory import available_bytes, module_bytes, readable
from library.training.plan import (
    RunPlan,
    data_workers,
    narrow_denoiser,
    narrow_text_encoders,
    training_length,
    wants_latent_cache,
    wants_text_cache,
    weight_dtypes,
)
from library.training.replay import Replay
from library.training.report import plan_rows, table
from library.training.resume import (
    Resume,
    data_fingerprint,
    find_resume,
    network_shape,
    resume_problems,
    starting_state,
)
from library.training.session import Session
from library.training.setting import Setting, Start
from library.training.state import TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        state: where it ended; None after a dry run.
        saved: result files that are still there.
        losses: loss of every optimizer step.
        validation: (step, loss) of every validation.
        stopped: what ended it before its last step, in words; empty when it ran to its end.
        exit_code: of the process: 0, or 128 + the number of the signal that stopped it.
    """

    state: TrainState | None
    saved: tuple[Path, ...] = ()
    losses: tuple[float, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    stopped: str = ""
    exit_code: int = 0


def run(family: Family, task: str, options: OptionSet) -> TrainResult:
    """Train; options are checked already.

    Raises:
        UserError: everything else that is wrong and can be known before weights load, or a failure that has a remedy.
    """
    tracking = options[TrackingOptions]
    log_folder = _log_folder(tracking)
    processes = start_processes(
        options[PrecisionOptions].mixed_precision,
        tracking.trackers,
        log_folder,
        timeout=options[DistributedOptions].ddp_timeout,
    )
    if processes.is_main:
        _say_what_others_see(options)
    resume = find_resume(options)
    seed = options[LengthOptions].seed
    seed = _shared_seed(resume.seed if seed is None and resume is not None else seed)
    inspected = inspect_run(family, options, seed, is_main=processes.is_main)
    plan, replay = make_plan(options, inspected, processes, seed)
    setting = Setting(family=family, task_name=task, plan=plan, inspected=inspected, processes=processes)
    start = make_start(setting, resume)
    facts = {**_facts(family, options, plan, processes), **_start_facts(start)}
    logger.info("%s", table("plan", plan_rows(plan, facts)))
    if options[DataOptions].debug_dataset:
        show_dataset(plan, is_main=processes.is_main)
        return TrainResult(None)
    if options[TimestepViewOptions].show_timesteps:
        if processes.is_main:
            show_levels(setting)
        return TrainResult(None)
    if options[ConfigOptions].dry_run:
        logger.info("--dry_run: stopped before training")
        return TrainResult(None)
    repository = _shared_repository(options[HubOptions], processes)
    set_backend_flags(options[PrecisionOptions])
    with output_lock(plan.names, is_main=processes.is_main):
        if processes.is_main and resume is not None:
            recover(resume.folder.parent)
        processes.wait_for_all()
        keep = start.state.step if resume is not None else None
        events = EventLog(plan.names.beside("_events.jsonl") if processes.is_main else None, keep)
        setting = replace(setting, uploader=_make_uploader(setting, repository, events))
        return _train(setting, start, replay, events, log_folder)


def _train(
    setting: Setting, start: Start, replay: Replay | None, events: EventLog, log_folder: str | None
) -> TrainResult:
    """Load, train, finish; whatever happens, uploads and logs come to their end."""
    family, plan = setting.family, setting.plan
    events.write(
        "start" if start.resume is None else "resume",
        family=family.name,
        task=setting.task_name,
        seed=plan.seed,
        step=start.state.step,
        steps=plan.max_steps,
        epochs=plan.num_epochs,
    )
    trackers = _start_trackers(setting, start, log_folder)
    setting = replace(setting, trackers=trackers)
    ended = False
    try:
        result = _run_session(setting, start, replay, events, trackers)
        ended = True
    finally:
        if setting.uploader is not None:
            setting.uploader.close()
        trackers.close(failed=not ended)
        if ended and result.state is not None:
            saved = [str(path) for path in result.saved]
            events.write("end", step=result.state.step, epoch=result.state.epoch, saved=saved)
        events.close()
    if plan.options[TrackingOptions].trackers:
        setting.processes.accelerator.state.destroy_process_group()
    return result


def _run_session(
    setting: Setting, start: Start, replay: Replay | None, events: EventLog, trackers: Trackers
) -> TrainResult:
    """Load, train, say what there is now."""
    processes = setting.processes
    session, saver = build_session(setting, replay, events, trackers.log, start)
    logger.info("%s", _memory_line(session, processes))
    if processes.is_main:
        logger.info(
            "process %d: Ctrl+C or SIGTERM finishes the step, saves the state and stops; orders go into %s",
            os.getpid(),
            session.control.file,
        )
    trainer = Trainer(session)
    state = trainer.run()
    saved = tuple(saver.saved) if saver else ()
    stopped, code = "", 0
    if trainer.stopped is not None:
        stopped, code = _stop(session, trainer.stopped)
    finish(session, saved, stopped)
    progress = session.progress
    return TrainResult(state, saved, tuple(progress.losses), tuple(progress.validation), stopped, code)


def _stop(session: Session, orders: Orders) -> tuple[str, int]:
    """Save what is needed to go on, unless the order was to drop it; in words, and the exit code."""
    number = session.control.signal_number
    code = 0 if not orders.signalled else 128 + (number or signal.SIGTERM)
    if "abort" in orders.verbs and not orders.signalled:
        return f"stopped at step {session.state.step} without saving", code
    session.services.ordered("save_state", session.state)
    session.processes.wait_for_all()
    return f"stopped at step {session.state.step}; go on with --resume auto", code


def make_start(setting: Setting, resume: Resume | None) -> Start:
    """Where the run begins, checked against the state it goes on from.

    Raises:
        UserError: it cannot go on from there.
    """
    plan, options = setting.plan, setting.plan.options
    data = data_fingerprint(plan.images)
    shape = network_shape(options, setting.family.default_network)
    if resume is not None:
        raise_problems(
            resume_problems(resume, options, family=setting.family.name, task=setting.task_name, shape=shape, data=data)
        )
    state = starting_state(
        resume,
        options,
        max_steps=plan.max_steps,
        steps_per_epoch=plan.steps_per_epoch,
        window=plan.accumulation * plan.world_size,
        data=data,
    )
    if state.step >= plan.max_steps and (resume is None or state.step > plan.max_steps):
        message = f"the run would begin at step {state.step} of {plan.max_steps}; raise --max_train_steps"
        raise UserError("--max_train_steps", plan.max_steps, message)
    own = resume is not None and not resume.head.get("foreign")
    started = resume.head["started_at"] if own else time.time()
    identity = {
        "session_id": resume.head["session_id"] if own else address(int(started * 1000), "session") % 2**32,
        "started_at": started,
        "family": setting.family.name,
        "task": setting.task_name,
        "seed": plan.seed,
        "network": shape,
        "data": data,
        "output_name": plan.names.base or "last",
    }
    asked = bool(options[StateOptions].resume)
    return Start(state, resume, identity, state.micro_step if asked else None)


def _is_locked(names: Names) -> UserError:
    message = (
        f"another run is writing results named {names.base or 'last'!r} there; wait for it, or choose another "
        "--output_dir or --output_name"
    )
    return UserError("--output_dir", str(names.folder), message)


@contextmanager
def output_lock(names: Names, *, is_main: bool) -> Iterator[None]:
    """One run at a time writes results of a name into a folder; a killed run's lock is gone with it.

    Raises:
        UserError: another run does.
    """
    if not is_main:
        yield
        return
    lock = FileLock(names.folder / f".{names.base or 'last'}.lock", timeout=0)
    try:
        names.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise _is_locked(names) from error
    except (OSError, NotImplementedError) as error:
        number = getattr(error, "errno", errno.ENOSYS)
        if number not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            message = f"cannot be written: {error}; choose another folder"
            raise UserError("--output_dir", str(names.folder), message) from error
        logger.warning("%s cannot be locked: nothing keeps a second run from writing there", names.folder)
    try:
        sweep_half_written(names.folder, names.base or "last", process_is_alive)
        yield
    finally:
        lock.release()


def show_dataset(plan: RunPlan, *, is_main: bool) -> None:
    """What `--debug_dataset` shows instead of training: the first visits as lines, contact sheets of each bucket."""
    if not is_main:
        return
    settings = plan.dataset().settings
    for line in debug_lines(plan.images.train, settings):
        logger.info("%s", line)
    paths = debug_sheets(plan.images.train, settings, plan.names.folder, plan.names.base or "last")
    logger.info("contact sheets: %s", ", ".join(map(str, paths)))
    logger.info("--debug_dataset: stopped before training")


def show_levels(setting: Setting) -> None:
    """Say, and draw if asked for, what noise levels would be trained and how much each would count."""
    plan, view = setting.plan, setting.plan.options[TimestepViewOptions]
    width, height = view.resolution or plan.images.train[0].plan.resolution
    factor = setting.family.latent.spatial_factor
    process = setting.strategies.denoising.process
    latent_size = height // factor, width // factor
    preview = preview_levels(process, latent_size, offset=view.show_timesteps_offset, seed=plan.seed)
    for line in preview_lines(preview):
        logger.info("%s", line)
    if view.show_timesteps == "image":
        path = plan.names.beside("_timesteps.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_preview(path, preview, f"{setting.family.title}, {width}x{height}")
        logger.info("drawn in %s", path)
    logger.info("--show_timesteps: stopped before training")


def finish(session: Session, saved: tuple[Path, ...], stopped: str = "") -> None:
    """Close the record and say what there is now, and what ended the run if it was not its last step."""
    if session.recorder is not None:
        session.recorder.close()
    progress = session.progress
    if session.processes.is_main and stopped:
        logger.info("%s", stopped)
    elif session.processes.is_main:
        usage = "load it as a LoRA in your image program, or go on with --network_weights " + str(saved[-1])
        logger.info("%s", progress.summary(session.plan.names, saved, usage))


def make_plan(
    options: OptionSet, inspected: Inspected, processes: Processes, seed: int
) -> tuple[RunPlan, Replay | None]:
    """All derived facts, and the record to replay if one was named."""
    length = options[LengthOptions]
    accumulation = length.gradient_accumulation_steps
    world_size = processes.world_size
    dtype, vae_dtype = weight_dtypes(options)
    num_batches = sum(images.ordered().num_batches() for images in inspected.images.train)
    per_epoch, steps, epochs = training_length(length, num_batches, accumulation * world_size)
    # these say what cannot be before anything loads
    build_schedule(options[ScheduleOptions], steps, options[OptimizerOptions])
    if options[OptimizerOptions].fused_backward_pass:
        check_fused(world_size, half=dtype == torch.float16)
    saving = options[SavingOptions]
    cache_latents = wants_latent_cache(options)
    facts: dict[str, Any] = {
        "options": options,
        "variant": inspected.variant,
        "images": inspected.images,
        "names": Names(Path(saving.output_dir), saving.output_name, f".{saving.save_model_as or 'safetensors'}"),
        "seed": seed,
        "dtype": dtype,
        "vae_dtype": vae_dtype,
        "accumulation": accumulation,
        "world_size": world_size,
        "num_batches": num_batches,
        "steps_per_epoch": per_epoch,
        "max_steps": steps,
        "num_epochs": epochs,
        "workers": data_workers(options, inspected.images),
        "cache_latents": cache_latents,
        "cache_text": wants_text_cache(options),
    }
    plan = RunPlan(**facts)
    folder = options[RecordOptions].replay_steps
    if not folder:
        return plan, None
    replay = Replay(
        folder,
        plan.dataset(),
        inspected.strategies.denoising,
        accumulation=accumulation,
        max_steps=steps,
        device=processes.device,
        seed=seed,
    )
    # the schedule still spans --max_train_steps; the run ends where the record does
    facts |= {"num_batches": replay.num_batches, "steps_per_epoch": replay.steps_per_epoch, "num_epochs": 1}
    return RunPlan(**facts), replay


def set_backend_flags(options: PrecisionOptions) -> None:
    """TF32 and cuDNN autotuning."""
    import torch

    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def _say_what_others_see(options: OptionSet) -> None:
    """What wandb tells others of the command line."""
    warnings, remarks = privacy_notes(options)
    for text in warnings:
        logger.warning("%s", text)
    for text in remarks:
        logger.info("%s", text)


def _shared_repository(options: HubOptions, processes: Processes) -> Repository | None:
    """The repository of uploads, opened by the main process; None on others, and when nothing is uploaded.

    Raises:
        UserError: on every process, what the main one found.
    """
    if not options.huggingface_repo_id:
        return None
    repository, problems = None, []
    if processes.is_main:
        try:
            repository = open_repository(options)
        except UserError as error:
            problems = error.problems
    raise_problems(broadcast_object_list([problems])[0])
    return repository


def _make_uploader(setting: Setting, repository: Repository | None, events: EventLog) -> Uploader | None:
    """With several processes uploads never stand in the way: the others would wait for the main one."""
    if repository is None:
        return None
    return Uploader(
        repository,
        setting.plan.names.folder / f".{setting.plan.names.base or 'last'}.uploads.{os.getpid()}.tmp",
        background=setting.plan.options[HubOptions].async_upload or setting.processes.world_size > 1,
        tell=events.write,
    )


def _start_trackers(setting: Setting, start: Start, log_folder: str | None) -> Trackers:
    """Those of the options, before anything loads."""
    options = setting.plan.options
    name = options[TrackingOptions].log_tracker_name or setting.family.tracker_name(setting.task_name, options)
    return start_trackers(setting.processes.accelerator, options, name, log_folder, start.state.step)


def _log_folder(options: TrackingOptions) -> str | None:
    if not options.logging_dir:
        return None
    return str(Path(options.logging_dir) / ((options.log_prefix or "") + datetime.now().strftime("%Y%m%d%H%M%S")))


def _shared_seed(given: int | None) -> int:
    """The seed of the run; a drawn one is the same on every rank."""
    if given is not None:
        return given
    drawn = [random.SystemRandom().randrange(2**32)]
    return broadcast_object_list(drawn)[0]


def _start_facts(start: Start) -> Mapping[str, str]:
    """Where the run begins, if not at the beginning."""
    state = start.state
    if state.step == 0 and start.resume is None:
        return {}
    place = f"step {state.step}, epoch {state.epoch}, after {state.batch_in_epoch} of its batches"
    return {"begins at": place + (f" (state {start.resume.folder})" if start.resume is not None else "")}


def _facts(family: Family, options: OptionSet, plan: RunPlan, processes: Processes) -> Mapping[str, Any]:
    """Lines of the plan that come from options alone."""
    network, optimizer = options[NetworkOptions], options[OptimizerOptions]
    caches = [
        f"{name} {'on disk' if disk else 'in memory'}"
        for name, on, disk in (
            ("latents", plan.cache_latents, options[CachingOptions].cache_latents_to_disk),
            ("text", plan.cache_text, keeps_texts_on_disk(options)),
        )
        if on
    ]
    free = available_bytes(processes.device)
    trained = "denoiser" if network.network_train_unet_only else "denoiser and text encoders"
    return {
        "family": family.title,
        "network": f"{network.network_module or family.default_network}, dim {network.network_dim}, "
        f"alpha {network.network_alpha:g}, on {trained}",
        "optimizer": optimizer.shown_name + (", fused with the backward pass" if optimizer.fused_backward_pass else ""),
        **_rate_facts(options, plan.max_steps),
        "caches": ", ".join(caches) or "none",
        "checkpointing": "on" if options[MemoryOptions].gradient_checkpointing else "off",
        "memory": _memory_estimate(plan, free),
        "device": f"{processes.device}" + (f", {readable(free)} free" if free else ""),
        "results": str(plan.names.final()),
        **_upload_facts(options[HubOptions], processes.world_size),
    }


def _upload_facts(options: HubOptions, world_size: int) -> dict[str, str]:
    """Where copies go."""
    if not options.huggingface_repo_id:
        return {}
    folder = f", folder {options.huggingface_path_in_repo}" if options.huggingface_path_in_repo else ""
    when = "while training goes on" if options.async_upload or world_size > 1 else "after each save"
    return {"uploads": f"{options.repo_type} {options.huggingface_repo_id}{folder}, {when}"}


def _rate_facts(options: OptionSet, steps: int) -> dict[str, str]:
    """Schedule, and the learning rates it leads to; networks may scale those of single layers."""
    network, optimizer, given = options[NetworkOptions], options[OptimizerOptions], options[ScheduleOptions]
    schedule = build_schedule(given, steps, optimizer)
    rate = optimizer.learning_rate
    rates: dict[str, float] = {}
    if not network.network_train_text_encoder_only:
        rates["denoiser"] = rate if network.unet_lr is None else network.unet_lr
    if not network.network_train_unet_only:
        of_text = network.text_encoder_lr or [rate]
        several = len(of_text) > 1
        rates |= {f"text encoder {n}" if several else "text encoders": one for n, one in enumerate(of_text, 1)}
    courses = rate_courses(schedule, optimizer, rates, steps)
    if isinstance(schedule, Schedule):
        name = f"{schedule.name}, warm-up {schedule.warmup}"
    else:
        name = schedule.name
    of = {part: "learning rate" if part == "all parts" else f"learning rate of {part}" for part, _ in courses}
    return {"schedule": name, **{of[part]: text for part, text in courses}}


def _memory_estimate(plan: RunPlan, free: int | None) -> str:
    """Bytes of the weights from the files' headers; adapters, activations and the optimizer come on top."""
    counts = dict(plan.variant.num_parameters)
    denoiser, *others = counts
    small = [denoiser] if narrow_denoiser(plan.options) else []
    if narrow_text_encoders(plan.options):
        small += [name for name in others if name not in ("VAE", "byT5")]
    parts = {name: count * (1 if name in small else plan.dtype.itemsize) for name, count in counts.items()}
    total = sum(parts.values())
    detail = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
    waiting = plan.options[MemoryOptions].blocks_to_swap
    kept = f", {waiting} blocks of the denoiser wait in main memory" if waiting else ""
    short = ", MORE THAN IS FREE" if not waiting and free is not None and max(parts.values(), default=0) > free else ""
    return f"weights {readable(total)} ({detail}){kept}{short}; activations and the adapter come on top"


def _memory_line(session: Session, processes: Processes) -> str:
    """What the loaded parts take, against what is left."""
    components = session.components
    frozen = module_bytes([components.denoiser, components.vae, *components.text_encoders])
    trained = sum(p.numel() * p.element_size() for p in session.optimizer.parameters)
    free = available_bytes(processes.device)
    left = f"; {readable(free)} free now" if free else ""
    return f"memory: model {readable(frozen)}, trained {readable(trained)}, gradients and optimizer about " + (
        f"{readable(3 * trained)}{left}"
    )
