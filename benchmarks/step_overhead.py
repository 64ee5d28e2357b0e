"""A training step of a tiny model with everything cached, beside the model's own compute. Target: compute + 5 ms.

python benchmarks/step_overhead.py

The same process times whole steps of the loop, then forward, backward and optimizer alone on the same inputs.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"})

from common import training_arguments, write_inputs

STEPS = 150


def main() -> None:
    import torch

    from library.train_util import parse_options, train
    from library.training import engine

    torch.set_num_threads(1)
    ends: list[float] = []
    inner: dict[str, float] = {}
    original = engine.Trainer.train_window

    def compute_alone(trainer, batches) -> float:
        """Median of forward, backward and optimizer on one batch's inputs."""
        session = trainer.session
        inputs = session.inputs.assemble(batches[0])
        conditioning = session.conditioning.get(inputs.batch.captions)
        times = []
        for _ in range(60):
            started = time.perf_counter()
            prediction = session.task.predict(inputs, conditioning)
            session.criterion(prediction, inputs).mean().backward()
            torch.nn.utils.clip_grad_norm_(session.optimizer.parameters, 1.0)
            session.optimizer.optimizer.step()
            session.optimizer.optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def timed(self, window, batches):
        result = original(self, window, batches)
        if self.session.state.step == STEPS - 1:
            inner["compute"] = compute_alone(self, batches)
        ends.append(time.perf_counter())
        return result

    engine.Trainer.train_window = timed
    with tempfile.TemporaryDirectory() as place:
        folder = write_inputs(Path(place))
        for family in ("flux", "sd"):
            ends.clear()
            train(family, "network", parse_options(family, "network", training_arguments(family, folder, STEPS)))
            steps = [b - a for a, b in itertools.pairwise(ends[20:-1])]
            step, compute = statistics.median(steps) * 1000, inner["compute"] * 1000
            state = "met" if step <= compute + 5 else "MISSED"
            print(
                f"{family}: step {step:.1f} ms, compute {compute:.1f} ms, beyond it {step - compute:+.1f} ms "
                f"({step / compute:.2f} x); target +5 ms: {state}"
            )


if __name__ == "__main__":
    main()
