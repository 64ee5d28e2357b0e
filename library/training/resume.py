"""Going on where an earlier run stopped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import CheckpointError, Problem
from library.base.logs import logger
from library.base.safetensors_io import TensorFile
from library.caching.fingerprints import digest
from library.checkpoint.hub import download_state
from library.checkpoint.saver import Names
from library.checkpoint.state_files import SavedState, find_states, present, read_head, read_state
from library.data.build import ImageSets
from library.optim.driver import OptimizerDriver
from library.options.hub import HubOptions
from library.options.network import NetworkOptions
from library.options.saving import SavingOptions
from library.options.schedule import LengthOptions
from library.options.schema import OptionSet
from library.options.state import StateOptions
from library.training.state import TrainState


@dataclass(frozen=True)
class Resume:
    """The state that a run goes on from: its folder and what it says of itself."""

    folder: Path
    head: Mapping[str, Any]

    @property
    def seed(self) -> int | None:
        """Of the earlier run."""
        return self.head.get("seed")


def state_names(options: OptionSet) -> Names:
    """Names of states: those of results with `-state` for extension."""
    saving = options[SavingOptions]
    return Names(Path(saving.output_dir or "."), saving.output_name, "-state")


def find_resume(options: OptionSet) -> Resume | None:
    """The state of `--resume`, or None to start anew.

    Raises:
        CheckpointError: the named state is missing or damaged.
        UserError: it cannot be fetched from the hub.
    """
    given = options[StateOptions].resume
    if not given:
        return None
    if options[HubOptions].resume_from_huggingface:
        folder = download_state(given, options[HubOptions])
    elif given == "auto":
        names = state_names(options)
        states = find_states(names.folder, names.base or "last")
        if not states:
            logger.info("--resume auto: no state of %r in %s yet, starting anew", names.base or "last", names.folder)
            return None
        folder = states[-1]
    else:
        folder = Path(given)
    head = read_head(present(folder))
    logger.info("going on from %s (step %d, epoch %d)", folder, head["step"], head["epoch"])
    if head.get("foreign"):
        message = (
            "%s was written by another program: weights, optimizer and step are taken, the place in its data is not"
        )
        logger.warning(message, folder)
    return Resume(folder, head)


def data_fingerprint(images: ImageSets) -> list[int]:
    """Two numbers that stand for everything the order and content of epochs follow from."""
    parts: list[object] = []
    for dataset in images.train:
        plan = dataset.plan
        parts += [plan.resolution, plan.batch_size]
        for record, place, visits in zip(dataset.records, dataset.placements, dataset.repeats):
            parts.append((record.subset, record.key, record.size, record.caption, place.bucket, place.resized, visits))
    return list(digest(*parts))


def model_identity(options: OptionSet) -> str:
    """A text that stands for the weights of the base model."""
    return TensorFile(options.value("pretrained_model_name_or_path")).identity()


def network_shape(options: OptionSet, default_module: str | None) -> dict[str, Any]:
    """What decides which weights an adapter has."""
    network = options[NetworkOptions]
    return {
        "network_module": network.network_module or default_module,
        "network_dim": network.network_dim,
        "network_args": sorted(network.network_args or ()),
        "network_train_unet_only": network.network_train_unet_only,
        "network_train_text_encoder_only": network.network_train_text_encoder_only,
    }


def resume_problems(
    resume: Resume, options: OptionSet, *, family: str, task: str, shape: Mapping[str, Any], data: list[int]
) -> Iterator[Problem]:
    """What makes it impossible to go on from a state with these options."""
    head = resume.head
    if head.get("foreign"):
        return
    where = str(resume.folder)
    for name, ours in (("family", family), ("task", task)):
        if head[name] != ours:
            yield Problem(where, f"is a state of {name} {head[name]}, not {ours}; name another one with --resume")
    if head["family"] != family:
        return
    for name, ours in shape.items():
        if head["network"].get(name) != ours:
            was = head["network"].get(name)
            yield Problem(f"--{name}", f"was {was!r} in {where}; an adapter cannot change while it is trained", ours)
    if head["base_model"] != model_identity(options):
        path = options.value("pretrained_model_name_or_path")
        yield Problem("--pretrained_model_name_or_path", f"is another model than the one of {where}", path)
    seed = options[LengthOptions].seed
    if seed is not None and seed != head["seed"]:
        yield Problem("--seed", f"was {head['seed']} in {where}; leave it out to go on with that", seed)
    if head["data"] != data and not options[StateOptions].resume_changed_data:
        message = (
            "was trained on other data (images, captions, sizes or repeats); --resume_changed_data goes on with the "
        )
        yield Problem(where, message + "next epoch")


def load_state(folder: Path) -> SavedState:
    """The state's tensors.

    Raises:
        CheckpointError: damaged.
    """
    return read_state(folder)


def starting_state(
    resume: Resume | None, options: OptionSet, *, max_steps: int, steps_per_epoch: int, window: int, data: list[int]
) -> TrainState:
    """Where the run starts: at the beginning, where the state says, or where `--initial_step` says.

    Args:
        resume: the state to go on from.
        options: of the run.
        max_steps: optimizer steps of the whole run.
        steps_per_epoch: of this run.
        window: batches per optimizer step over all processes.
        data: fingerprint of the data.
    """
    length = options[LengthOptions]
    if length.initial_step is not None or length.initial_epoch is not None:
        step = length.initial_step
        if step is None:
            step = ((length.initial_epoch or 1) - 1) * steps_per_epoch
        epochs, inside = divmod(step, steps_per_epoch)
        taken = inside * window if length.skip_until_initial_step else 0
        return TrainState(max_steps, step=step, micro_step=0, epoch=epochs + 1, batch_in_epoch=taken)
    if resume is None:
        return TrainState(max_steps)
    head = resume.head
    if head.get("foreign"):
        return TrainState(max_steps, step=head["step"], epoch=head["step"] // steps_per_epoch + 1)
    counters = {name: head[name] for name in ("step", "micro_step", "epoch", "batch_in_epoch")}
    if head["data"] != data:
        counters |= {"epoch": head["epoch"] + 1, "batch_in_epoch": 0}
        logger.warning("the data changed: going on with epoch %d", counters["epoch"])
    return TrainState(max_steps, **counters)


def restore(saved: SavedState, network: Any, driver: OptimizerDriver, folder: Path, step: int) -> None:
    """Put weights and optimizer back.

    Raises:
        CheckpointError: they do not fit.
    """
    try:
        network.load_state_dict(saved.weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError("--resume", str(folder), f"its weights do not fit this adapter: {reason}") from error
    if saved.optimizer is None:
        logger.warning("%s holds no optimizer that fits: it starts anew", folder)
        driver.go_to(step)
        return
    try:
        driver.load_state(saved.optimizer if not saved.foreign else {"optimizer": saved.optimizer}, step)
    except (ValueError, KeyError, RuntimeError) as error:
        if saved.foreign:
            logger.warning("%s: its optimizer does not fit (%s) and starts anew", folder, error)
            driver.go_to(step)
            return
        raise CheckpointError("--resume", str(folder), f"its optimizer does not fit: {error}") from error
