"""From the start of a script to its first finished step, beside the imports it needs. Target: imports + 1 s.

python benchmarks/start_to_first_step.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ENVIRONMENT, ROOT, median, training_arguments, write_inputs

# torch, and what the run needs of transformers and diffusers
IMPORTS = {
    "sd": "import torch; from transformers import CLIPTextModel, CLIPTokenizer; "
    "from diffusers import AutoencoderKL, UNet2DConditionModel",
    "flux": "import torch; from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer; "
    "from diffusers import AutoencoderKL",
}
RUNS = 7
SCRIPTS = {"sd": "train_network.py", "flux": "flux_train_network.py"}


def import_time(imports: str) -> float:
    """Seconds from the start of a process until it has imported something; its exit does not count."""
    started = time.time()
    command = [sys.executable, "-c", f"{imports}; import time; print(time.time())"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1]) - started


DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def first_step(family: str, folder: Path, *more: str) -> float:
    """Seconds until the event log shows a finished step."""
    started = time.time()
    command = [sys.executable, SCRIPTS[family], *training_arguments(family, folder, 1), *more]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    lines = (folder / "out" / f"{family}_events.jsonl").read_text(encoding="utf-8").splitlines()
    return next(event["time"] for event in map(json.loads, lines) if event["event"] == "step") - started


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write_inputs(Path(place))
        torch = median(lambda: import_time("import torch"), runs=3)
        print(f"import torch {torch:.2f} s")
        for family in SCRIPTS:
            # in turns, so that a machine that gets slower or faster does so for both
            pairs = [(import_time(IMPORTS[family]), first_step(family, folder)) for _ in range(RUNS + 1)][1:]
            floor, taken = (statistics.median(values) for values in zip(*pairs))
            state = "met" if taken <= floor + 1 else "MISSED"
            print(
                f"{family}: first step after {taken:.2f} s, bare imports {floor:.2f} s, "
                f"beyond them {taken - floor:+.2f} s ({taken / floor:.2f} x); target +1 s: {state}"
            )
        first_step("flux", folder, *DISK)  # fills the caches
        pairs = [(import_time("import torch"), first_step("flux", folder, *DISK)) for _ in range(RUNS + 1)][1:]
        floor, taken = (statistics.median(values) for values in zip(*pairs))
        state = "met" if taken <= floor + 1.5 else "MISSED"
        print(
            f"flux, complete caches on disk: first step after {taken:.2f} s, torch alone {floor:.2f} s, "
            f"beyond it {taken - floor:+.2f} s; target +1.5 s: {state}"
        )


if __name__ == "__main__":
    main()
