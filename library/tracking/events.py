"""A machine-readable log of a run: one JSON object per line."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from library.base.logs import logger
from library.base.safetensors_io import write_text_atomic


class EventLog:
    """Appends events to a JSON Lines file; every line is flushed, so a killed run leaves whole lines.

    Threads may write at the same time.

    Args:
        path: the file, or None to drop everything (other ranks).
        keep_until: optimizer step up to which events of an earlier run stay; None begins a new log.
    """

    def __init__(self, path: Path | None, keep_until: int | None = None) -> None:
        self.path = path
        self.kept: list[dict[str, Any]] = []
        self._file = None
        self._writing = threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if keep_until is not None:
                self.kept = _events_until(path, keep_until)
            text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in self.kept)
            if keep_until is not None:
                write_text_atomic(path, text)
            self._file = open(path, "a" if keep_until is not None else "w", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Add one event with the current time (seconds since 1970)."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, ensure_ascii=False)
        with self._writing:
            if self._file is None:
                return
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:  # a log is no reason to lose a training
                logger.warning("%s cannot be written any more (%s)", self.path, error.strerror or error)
                self._file = None

    def close(self) -> None:
        """Close the file."""
        with self._writing:
            if self._file is not None:
                self._file.close()
                self._file = None


def _events_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Events of an earlier run up to a step; a line that its end left incomplete is dropped."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") != "end" and event.get("step", 0) <= step:
            events.append(event)
    return events
