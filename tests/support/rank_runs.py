"""Several trainings in the processes of one launch; the argument is a JSON file of [model, arguments]."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from library.base.logs import setup_logging  # noqa: E402
from support.runs import run_training  # noqa: E402

if __name__ == "__main__":
    setup_logging()
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
        run_training(name, arguments)
