"""When results are saved, under which names, and which old ones go."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import UserError
from library.base.logs import logger
from library.options.saving import SavingOptions
from library.options.state import StateOptions


@dataclass(frozen=True)
class Names:
    """File names of a run's results inside the output folder.

    Attributes:
        folder: `--output_dir`.
        base: `--output_name`, or None for the customary defaults.
        extension: with the dot.
    """

    folder: Path
    base: str | None
    extension: str

    def epoch(self, number: int) -> Path:
        """Result after an epoch (from 1)."""
        return self.folder / f"{self.base or 'epoch'}-{number:06d}{self.extension}"

    def step(self, number: int) -> Path:
        """Result after an optimizer step."""
        return self.folder / f"{self.base or 'at'}-step{number:08d}{self.extension}"

    def final(self) -> Path:
        """Result of the whole run."""
        return self.folder / f"{self.base or 'last'}{self.extension}"

    def best(self) -> Path:
        """The result with the lowest validation loss."""
        return self.folder / f"{self.base or 'last'}-best{self.extension}"

    def beside(self, suffix: str) -> Path:
        """Another file of the run: `<output_name><suffix>`."""
        return self.folder / f"{self.base or 'last'}{suffix}"


def averaged(path: Path) -> Path:
    """Name of the averaged weights beside a result."""
    return path.with_name(f"{path.stem}-ema{path.suffix}")


def dialect_path(path: Path, dialect: str) -> Path:
    """Name of a result in the names of another program, beside it."""
    return path.with_name(f"{path.stem}-{dialect}.safetensors")


Write = Callable[[Path, int, int], None]


def cannot_save(path: Path, error: OSError) -> UserError:
    """What to say when something cannot be written; nothing half written is left, earlier files are untouched."""
    reason = error.strerror or str(error)
    message = f"cannot be written: {reason}; make room or name another --output_dir, then go on with --resume auto"
    return UserError(str(path), message=message)


class Saver:
    """Saves results by step and epoch and removes the ones that are too old.

    Args:
        options: cadence and rotation.
        names: file names.
        num_epochs: epochs of the run.
        write: writes a result: (path, step, epoch).
        dialects: in which each result is written too.
    """

    def __init__(
        self, options: SavingOptions, names: Names, num_epochs: int, write: Write, dialects: Sequence[str] = ()
    ) -> None:
        self.dialects = tuple(dialects)
        self.options = options
        self.names = names
        self.num_epochs = num_epochs
        self.write = write
        self.saved: list[Path] = []
        self.every_epochs = options.save_every_n_epochs
        if options.save_n_epoch_ratio:
            self.every_epochs = num_epochs // options.save_n_epoch_ratio or 1

    def after_step(self, step: int, epoch: int) -> None:
        """Save if `--save_every_n_steps` divides the step; then remove the step result that left the window."""
        if not self.is_due(step):
            return
        every = self.options.save_every_n_steps or 1
        self._save(self.names.step(step), step, epoch)
        if self.options.save_last_n_steps:
            old = step - self.options.save_last_n_steps - 1
            old -= old % every
            self._remove(self.names.step(old), old)

    def after_epoch(self, step: int, epoch: int) -> None:
        """Save if `--save_every_n_epochs` divides the epoch; the last epoch's result is the final one."""
        if not self.is_due_after(epoch):
            return
        every = self.every_epochs or 1
        self._save(self.names.epoch(epoch), step, epoch)
        if self.options.save_last_n_epochs:
            old = epoch - every * self.options.save_last_n_epochs
            self._remove(self.names.epoch(old), old)

    def at_end(self, step: int, epoch: int) -> None:
        """Save the final result."""
        self._save(self.names.final(), step, epoch)

    def now(self, step: int, epoch: int) -> None:
        """Save because somebody asked for it."""
        self._save(self.names.step(step), step, epoch)

    def best(self, step: int, epoch: int) -> None:
        """Save the best result so far over the one before it."""
        self._save(self.names.best(), step, epoch)

    def is_due(self, step: int) -> bool:
        """Whether a result is saved after this step."""
        every = self.options.save_every_n_steps
        return bool(every) and step % every == 0

    def is_due_after(self, epoch: int) -> bool:
        """Whether a result is saved after this epoch."""
        return bool(self.every_epochs) and epoch % self.every_epochs == 0 and epoch < self.num_epochs

    def _save(self, path: Path, step: int, epoch: int) -> None:
        try:
            self.write(path, step, epoch)
        except OSError as error:
            raise cannot_save(path, error) from error
        if path not in self.saved:
            self.saved.append(path)

    def _beside(self, path: Path) -> Iterator[Path]:
        """Files that were saved together with a result."""
        yield averaged(path)
        for dialect in self.dialects:
            yield from (dialect_path(path, dialect), dialect_path(averaged(path), dialect))

    def _remove(self, path: Path, number: int) -> None:
        """The new result is complete under its name before an old one goes."""
        if number >= 0 and path.is_file():
            path.unlink()
            for other in self._beside(path):
                other.unlink(missing_ok=True)
            self.saved = [kept for kept in self.saved if kept != path]
            logger.info("removed the old result %s", path)


class StateSaver:
    """Saves training states: with results, by time, at the end, and when asked; removes the ones that are too old.

    Args:
        options: when, and how many stay.
        results: cadence of the results that states go with.
        names: names of the folders.
        write: writes a state: (folder, step, epoch).
        clock: seconds.
    """

    def __init__(
        self, options: StateOptions, results: Saver, names: Names, write: Write, clock: Callable[[], float]
    ) -> None:
        self.options = options
        self.results = results
        self.names = names
        self.write = write
        self.clock = clock
        self.last_saved_at = clock()
        self._by_time: Path | None = None

    def after_step(self, step: int, epoch: int) -> None:
        """With a result, or when the last state is too old."""
        minutes = self.options.save_state_every_n_minutes
        if self.options.save_state and self.results.is_due(step):
            self.now(step, epoch)
            self._rotate_steps(step)
        elif minutes and self.clock() - self.last_saved_at >= 60 * minutes:
            older, self._by_time = self._by_time, self.names.step(step)
            self.now(step, epoch)
            if older is not None and older != self._by_time:
                _remove_state(older)

    def after_epoch(self, step: int, epoch: int) -> None:
        """With a result."""
        if not (self.options.save_state and self.results.is_due_after(epoch)):
            return
        self._save(self.names.epoch(epoch), step, epoch)
        count = self.options.save_last_n_epochs_state or self.results.options.save_last_n_epochs
        if count:
            old = epoch - (self.results.every_epochs or 1) * count
            for number, folder in self._numbered("-"):
                if number <= old:
                    _remove_state(folder)

    def at_end(self, step: int, epoch: int) -> None:
        """With the final result, or when only that was asked for."""
        if self.options.save_state or self.options.save_state_on_train_end:
            self._save(self.names.final(), step, epoch)

    def now(self, step: int, epoch: int) -> Path:
        """A state of this step."""
        return self._save(self.names.step(step), step, epoch)

    def _save(self, folder: Path, step: int, epoch: int) -> Path:
        try:
            self.write(folder, step, epoch)
        except OSError as error:
            raise cannot_save(folder, error) from error
        self.last_saved_at = self.clock()
        return folder

    def _rotate_steps(self, step: int) -> None:
        count = self.options.save_last_n_steps_state or self.results.options.save_last_n_steps
        if count:
            for number, folder in self._numbered("-step"):
                if number < step - count:
                    _remove_state(folder)

    def _numbered(self, mark: str) -> list[tuple[int, Path]]:
        """States of this run and of earlier ones of its name: (number, folder)."""
        start = f"{self.names.base or ('at' if mark == '-step' else 'epoch')}{mark}"
        found = []
        for folder in self.names.folder.glob("*-state"):
            number = folder.name.removeprefix(start).removesuffix("-state")
            if folder.name.startswith(start) and number.isdecimal():
                found.append((int(number), folder))
        return found


def _remove_state(folder: Path) -> None:
    """Its head goes first, so that a half removed state is none."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    logger.info("removed the old state %s", folder)
