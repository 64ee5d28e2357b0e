"""TensorBoard and Weights & Biases, by way of accelerate's trackers."""

import inspect
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from library.base.errors import Problem, UserError, nearest, raise_problems
from library.base.lazy import optional_import
from library.base.logs import logger
from library.options.schema import OptionSet
from library.options.tracking import TrackingOptions
from library.tracking.recorded import hide, recorded_options, secrets_hidden, secrets_of

# tracker -> (module to import, what `pip install` wants)
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}
# arguments that an option of ours gives
_OURS = {
    "tensorboard": {"log_dir": "--logging_dir"},
    "wandb": {"project": "--log_tracker_name", "config": "--log_config"},
}
# keys that place a value in time: shown as axes, not as curves
_AXES = ("epoch", "val_step", "global_step")


@dataclass(frozen=True)
class Moment:
    """When something was measured.

    Attributes:
        step: optimizer steps taken.
        epoch: from 1.
        per_epoch: whether it belongs to a whole epoch, so that its curve counts epochs.
    """

    step: int
    epoch: int
    per_epoch: bool = False


def check_trackers(options: TrackingOptions) -> None:
    """Look whether the trackers are installed and understand their arguments; nothing is started.

    Raises:
        UserError: a package is missing, the file of `--log_tracker_config` cannot be used.
    """
    problems: list[Problem] = []
    for name in options.trackers:
        module, package = _PACKAGES[name]
        flag = f"--log_with {name}" if options.log_with else "--logging_dir"
        try:
            optional_import(module, needed_for=flag, install=package)
        except UserError as error:
            problems += error.problems
    raise_problems(problems)
    tracker_arguments(options)


def tracker_arguments(options: TrackingOptions) -> dict[str, dict[str, Any]]:
    """Tracker -> the arguments that `--log_tracker_config` gives it.

    Raises:
        UserError: unreadable, no TOML, or arguments that the tracker does not take.
    """
    given = options.log_tracker_config
    if not given:
        return {}
    flag = "--log_tracker_config"
    try:
        content = tomllib.loads(Path(given).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(flag, given, f"cannot be read: {error.strerror or error}; name a TOML file") from error
    except ValueError as error:  # no UTF-8, no TOML
        raise UserError(flag, given, f"is not valid TOML: {error}") from error
    problems: list[Problem] = []
    for name, arguments in content.items():
        if not isinstance(arguments, dict):
            problems.append(Problem(f"{given}: {name}", "expected a table: [wandb] or [tensorboard]"))
        elif name not in _PACKAGES:
            problems.append(Problem(f"{given}: [{name}]", "there are the tables [wandb] and [tensorboard]"))
        elif name not in options.trackers:
            logger.warning("%s: [%s] has no effect: this run does not use it", given, name)
        else:
            problems += _argument_problems(f"{given}: {name}", name, arguments)
    raise_problems(problems)
    return {name: dict(arguments) for name, arguments in content.items() if name in options.trackers}


def _argument_problems(where: str, tracker: str, arguments: Mapping[str, Any]) -> list[Problem]:
    known = list(inspect.signature(_target(tracker)).parameters)
    problems = []
    for key in arguments:
        if key in _OURS[tracker]:
            problems.append(Problem(f"{where}.{key}", f"is given by {_OURS[tracker][key]}; remove it here"))
        elif key not in known:
            close = nearest(key, known)
            message = f"is not an argument of {_target(tracker).__name__}"
            problems.append(Problem(f"{where}.{key}", message + (f"; did you mean {close!r}?" if close else "")))
    return problems


def _target(tracker: str) -> Callable[..., Any]:
    """What receives the arguments."""
    if tracker == "wandb":
        import wandb

        return wandb.init
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def _all_arguments(options: TrackingOptions, folder: str | None, begins_at: int) -> dict[str, dict[str, Any]]:
    """Our arguments, with the file's over them."""
    given = tracker_arguments(options)
    ours: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": begins_at}, "wandb": {}}
    if options.wandb_run_name:
        ours["wandb"]["name"] = options.wandb_run_name
    if folder:
        ours["wandb"]["dir"] = folder
    made = {name: {**ours[name], **given.get(name, {})} for name in options.trackers}
    if "wandb" in made and options.wandb_api_key:
        # as a setting it is neither written to .netrc nor recorded
        settings = made["wandb"].get("settings") or {}
        made["wandb"]["settings"] = {"api_key": options.wandb_api_key, **settings}
    return made


def start_trackers(
    accelerator: Accelerator, options: OptionSet, project: str, folder: str | None, begins_at: int
) -> "Trackers":
    """Start the trackers that the accelerator was made with; on other processes than the main one nothing happens.

    Args:
        accelerator: of the run.
        options: of the run.
        project: name under which runs are gathered.
        folder: of this run's logs.
        begins_at: step at which the run begins; later entries of an earlier run of the same folder are hidden.

    Raises:
        UserError: a tracker does not start.
    """
    tracking = options[TrackingOptions]
    if not tracking.trackers:
        return Trackers([])
    arguments = _all_arguments(tracking, folder, begins_at)
    if folder and accelerator.is_main_process:
        Path(folder).mkdir(parents=True, exist_ok=True)
    config = recorded_options(options) if tracking.log_config else None
    secrets = secrets_of(options)
    try:
        with secrets_hidden(secrets):
            accelerator.init_trackers(project, config=config, init_kwargs=arguments)
    except Exception as error:  # whatever a service, its client or a disk has to say
        reason = hide(" ".join(str(error).split()) or type(error).__name__, secrets)
        message = f"does not start: {reason}"
        if "wandb" in arguments:
            message += "; without an account or a network set WANDB_MODE=offline"
        raise UserError("--log_with", " and ".join(tracking.trackers), message) from error
    trackers = Trackers(accelerator.trackers if accelerator.is_main_process else [])
    trackers.hide_axes()
    return trackers


class Trackers:
    """Where a run's numbers and sample images go. A tracker that fails is left out from then on, with a warning.

    Args:
        trackers: started ones; none on processes that do not write.
    """

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = list(trackers)

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._trackers)

    def hide_axes(self) -> None:
        """Tell wandb which values are places in time."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                for axis in _AXES:
                    tracker.tracker.define_metric(axis, hidden=True)

    def log(self, values: Mapping[str, float], moment: Moment) -> None:
        """Numbers by name. TensorBoard counts epochs for what belongs to an epoch; wandb gets both counts as values."""

        def send(tracker: GeneralTracker) -> None:
            if tracker.name == "wandb":
                tracker.log({**values, "global_step": moment.step, "epoch": moment.epoch})
            else:
                tracker.log(dict(values), step=moment.epoch if moment.per_epoch else moment.step)

        self._each(send)

    def image(self, path: Path, prompt: str, index: int, moment: Moment) -> None:
        """A sample image.

        Args:
            path: of the image file.
            prompt: what it shows; the caption.
            index: of the prompt, which gives the image its name: `sample_<index>`.
            moment: when it was made; images count steps.
        """
        name = f"sample_{index}"

        def send(tracker: GeneralTracker) -> None:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            if tracker.name == "wandb":
                import wandb

                values = {name: wandb.Image(image, caption=prompt)}
                tracker.log({**values, "global_step": moment.step, "epoch": moment.epoch})
            else:
                tracker.tracker.add_image(name, np.asarray(image), moment.step, dataformats="HWC")
                tracker.tracker.add_text(f"{name}/prompt", prompt, moment.step)

        self._each(send)

    def close(self, *, failed: bool) -> None:
        """Send what is left; the run counts as finished or as failed."""

        def end(tracker: GeneralTracker) -> None:
            if tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1 if failed else 0)
            else:
                tracker.finish()

        self._each(end)
        self._trackers = []

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # curves are no reason to lose a training
                logger.warning("%s does not take any more (%s): the run goes on without it", tracker.name, error)
                self._trackers.remove(tracker)
