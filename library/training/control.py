"""Orders to a running training: signals, lines on stdin, a control file.

One process polls; what it heard travels to the others with the sum of the loss, and all act at the same boundary
between two steps.
"""

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import torch
from torch import Tensor

from library.base.errors import nearest
from library.base.logs import logger

# verb -> its bit in what the processes tell each other
BITS = {"save": 1, "save_state": 2, "sample": 4, "eval": 8, "pause": 16, "quit": 32, "abort": 64}
VERBS = (*BITS, "lr", "status", "resume", "at")
_FIELDS = 4  # bits, new rate, whether there is one, signals
_SECONDS_READ_ON = 2.0  # from a file that was taken away while somebody wrote to it
_MOST_LINES = 200  # read from a file or pipe at one boundary; the rest waits or is dropped with a word


@dataclass
class Orders:
    """What all processes do at a boundary."""

    verbs: frozenset[str] = frozenset()
    rate: float | None = None
    signalled: bool = False

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return self.signalled or bool(self.verbs & {"quit", "abort"})


@dataclass
class _Taken:
    path: Path
    file: BinaryIO
    until: float
    begun: bytes = b""  # a line without an end yet

    def give_up(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


class _OrderFile:
    """Lines that others write to a file, each read once.

    The file is taken away by its name before it is read. Who had it open then may still be writing: so what was taken
    is read on for a while, and a line that has no end yet waits for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._taken: list[_Taken] = []
        self._count = 0

    def clear(self) -> None:
        """Forget what was written."""
        for taken in self._taken:
            taken.give_up()
        self._taken = []
        self.path.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """What was written since the last call, without empty lines."""
        name = self.path.with_name(f"{self.path.name}.{self._count}.taken")
        try:
            os.replace(self.path, name)
        except OSError:  # not there; on Windows also: open elsewhere, so it waits
            pass
        else:
            self._count += 1
            self._taken.append(_Taken(name, open(name, "rb"), time.monotonic() + _SECONDS_READ_ON))
        heard: list[str] = []
        reading, self._taken = self._taken, []
        for taken in reading:
            over = time.monotonic() > taken.until
            data = taken.begun + taken.file.read()
            whole, _, taken.begun = data.rpartition(b"\n")
            heard += (data if over else whole).decode("utf-8", errors="replace").splitlines()
            if over:
                taken.give_up()
            else:
                self._taken.append(taken)
        return [line for line in heard if line.strip()]


class Control:
    """Hears orders and brings them to all processes.

    Args:
        file: the control file; looked at on the main process.
        interactive: read lines from stdin too.
        is_main: whether this process hears files and stdin.
        status: answers `status`.
    """

    def __init__(self, file: Path, *, interactive: bool, is_main: bool, status: Callable[[], str]) -> None:
        self.file = file
        self._written = _OrderFile(file)
        self.is_main = is_main
        self.status = status
        self.signal_number: int | None = None
        self._bits = 0
        self._rate: float | None = None
        self._later: list[tuple[int, str]] = []
        self._lines: queue.Queue[str] = queue.Queue(maxsize=10 * _MOST_LINES)
        self._parent = os.getppid()
        self._interactive = interactive and is_main
        self._resumed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are orders inside; a second one ends the process at once."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._on_signal)
        if self.is_main:
            self._written.clear()  # orders to an earlier run
        if self._interactive:
            threading.Thread(target=self._read_stdin, name="stdin", daemon=True).start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.is_main:
                self._written.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
        # not through the logger: a signal may interrupt it while it holds its lock
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step, then saving the state; once more stops at once\n".encode())

    def _read_stdin(self) -> None:
        for line in sys.stdin:
            try:
                self._lines.put_nowait(line)
            except queue.Full:  # a flood: what does not fit is dropped
                time.sleep(0.01)

    def poll(self, step: int) -> None:
        """Take in what was said since the last boundary; only the main process has anything to hear but signals.

        Args:
            step: optimizer steps taken.
        """
        if os.getppid() != self._parent and self.signal_number is None:
            logger.warning("the launcher is gone: stopping after this step")
            self.signal_number = signal.SIGTERM
        if not self.is_main:
            return
        for line in self._heard():
            self.take(line)
        due = [verb for when, verb in self._later if when <= step]
        self._later = [(when, verb) for when, verb in self._later if when > step]
        for line in due:
            self.take(line)

    def _heard(self) -> Iterator[str]:
        for _ in range(_MOST_LINES):
            try:
                yield self._lines.get_nowait()
            except queue.Empty:
                break
        lines = self._written.lines()
        if len(lines) > _MOST_LINES:
            logger.warning("%s: %d lines; only the first %d are read", self.file, len(lines), _MOST_LINES)
        yield from lines[:_MOST_LINES]

    def take(self, line: str) -> None:
        """One line. A line that says nothing is answered, never fatal."""
        words = line.split()
        if not words:
            return
        verb, *arguments = words
        verb = verb.lower()
        if verb in BITS and not arguments:
            self._bits |= BITS[verb]
        elif verb == "status" and not arguments:
            logger.info("%s", self.status())
            return
        elif verb == "resume" and not arguments:
            self._resumed = True
        elif verb == "lr" and len(arguments) == 1:
            try:
                rate = float(arguments[0])
            except ValueError:
                rate = -1.0
            if not 0 <= rate < 1e3:
                logger.warning("lr %s: expected a number from 0 up, for example: lr 1e-4", arguments[0])
                return
            self._rate = rate
        elif verb == "at" and len(arguments) >= 2 and arguments[0].isdecimal() and arguments[1].lower() != "at":
            self._later.append((int(arguments[0]), " ".join(arguments[1:])))
        else:
            guess = nearest(verb, list(VERBS))
            known = ", ".join(VERBS)
            hint = f"did you mean {guess}? " if guess and guess != verb else ""
            logger.warning("%s: not understood; %sthere are: %s (lr X, at STEP VERB)", line.strip()[:80], hint, known)
            return
        logger.info("heard: %s", " ".join(words))

    def outgoing(self) -> Tensor:
        """[4] float64: what this process has to say; starts anew."""
        rate = self._rate
        said = torch.tensor(
            [self._bits, rate or 0.0, rate is not None, self.signal_number is not None], dtype=torch.float64
        )
        self._bits, self._rate = 0, None
        return said

    @staticmethod
    def understood(summed: Tensor) -> Orders:
        """Orders in the sum of what all processes said."""
        bits, rate, has_rate, signals = summed.tolist()
        verbs = frozenset(verb for verb, bit in BITS.items() if int(bits) & bit)
        return Orders(verbs, rate if has_rate else None, signals > 0)

    def wait_for_resume(self, step: int) -> None:
        """Pause: until `resume`, an order to stop, or a signal. On the main process."""
        self._resumed = False
        logger.info("paused at step %d; `resume` goes on, `quit` saves the state and ends", step)
        while not self._resumed and self.signal_number is None and not self._bits & (BITS["quit"] | BITS["abort"]):
            time.sleep(0.1)
            self.poll(step)
