"""When results are saved, under which names, and which old ones go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.base.logs import logger
from library.options.saving import SavingOptions


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

    def beside(self, suffix: str) -> Path:
        """Another file of the run: `<output_name><suffix>`."""
        return self.folder / f"{self.base or 'last'}{suffix}"


Write = Callable[[Path, int, int], None]


class Saver:
    """Saves results by step and epoch and removes the ones that are too old.

    Args:
        options: cadence and rotation.
        names: file names.
        num_epochs: epochs of the run.
        write: writes a result: (path, step, epoch).
    """

    def __init__(self, options: SavingOptions, names: Names, num_epochs: int, write: Write) -> None:
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
        every = self.options.save_every_n_steps
        if not every or step % every:
            return
        self._save(self.names.step(step), step, epoch)
        if self.options.save_last_n_steps:
            old = step - self.options.save_last_n_steps - 1
            old -= old % every
            self._remove(self.names.step(old), old)

    def after_epoch(self, step: int, epoch: int) -> None:
        """Save if `--save_every_n_epochs` divides the epoch; the last epoch's result is the final one."""
        every = self.every_epochs
        if not every or epoch % every or epoch >= self.num_epochs:
            return
        self._save(self.names.epoch(epoch), step, epoch)
        if self.options.save_last_n_epochs:
            old = epoch - every * self.options.save_last_n_epochs
            self._remove(self.names.epoch(old), old)

    def at_end(self, step: int, epoch: int) -> None:
        """Save the final result."""
        self._save(self.names.final(), step, epoch)

    def _save(self, path: Path, step: int, epoch: int) -> None:
        self.write(path, step, epoch)
        self.saved.append(path)

    def _remove(self, path: Path, number: int) -> None:
        """The new result is complete under its name before an old one goes."""
        if number >= 0 and path.is_file():
            path.unlink()
            self.saved = [kept for kept in self.saved if kept != path]
            logger.info("removed the old result %s", path)
