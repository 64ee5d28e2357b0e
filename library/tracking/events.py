"""A machine-readable log of a run: one JSON object per line."""

import json
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a JSON Lines file; every line is flushed, so a killed run leaves whole lines.

    Args:
        path: the file, or None to drop everything (other ranks).
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Add one event with the current time (seconds since 1970)."""
        if self._file is not None:
            line = json.dumps({"event": event, "time": round(time.time(), 3), **values}, ensure_ascii=False)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
