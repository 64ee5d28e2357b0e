"""Two gloo ranks against one process that accumulates twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import FAMILY, MODEL_FLAGS, dataset_toml, events, network_arguments, run_training

from library.base.safetensors_io import load_file
from library.training import checks

ROOT = Path(__file__).resolve().parents[2]


def launch(script, arguments, processes):
    """A real `accelerate launch` on the CPU; `--multi_gpu` is what makes it start several processes there."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, str(ROOT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


MODELS = sorted(set(MODEL_FLAGS) - set(FAMILY))


def ranked_arguments(name, inputs, folder, accumulation):
    """Seven training images in batches of two make four batches with a short last window; dropout is on."""
    folder.mkdir(parents=True)
    toml = dataset_toml(folder, inputs, batch_size=2, dataset="validation_split = 0.3\nvalidation_seed = 1")
    more = ("--gradient_accumulation_steps", accumulation, "--network_dropout", "0.1", "--max_train_steps", "5")
    return network_arguments(name, inputs, folder, toml, *more, "--cache_latents")


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory):
    """Folder with the results of every model's training by two ranks, all in one launch."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [(name, ranked_arguments(name, inputs, folder / name, "1")) for name in MODELS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("tests/support/rank_runs.py", [str(folder / "jobs.json")], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("x 2 processes per optimizer step") == len(MODELS)
    assert done.stderr.count("use it") == len(MODELS)  # one rank talks
    return folder


def found(folder):
    """Losses, gradient norms and validation losses of a run, and its adapter."""
    log = events(folder / "out")
    steps = [event for event in log if event["event"] == "step"]
    validated = [event["loss"] for event in log if event["event"] == "validation"]
    values = [event["loss"] for event in steps], [event["norm/grad"] for event in steps], validated
    return values, load_file(folder / "out" / "last.safetensors")


@pytest.mark.dist
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_accumulation_two(name, inputs, two_ranks, tmp_path):
    run_training(name, ranked_arguments(name, inputs, tmp_path / "one", "2"))
    (ones, a), (twos, b) = found(tmp_path / "one"), found(two_ranks / name)
    for one, two in zip(ones, twos, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    error = sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
    assert error <= 1e-3 * sum(float(a[name].square().sum()) for name in a if "lora_up" in name) ** 0.5


SEEDS_AND_WAITING = """
import sys, time
sys.path.insert(0, sys.argv[1])
from datetime import timedelta
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from library.training.distributed import Processes
from library.training.run import _shared_seed
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=4))])
processes = Processes(accelerator)
print(f"<seed {_shared_seed(None)}>", flush=True)
processes.wait_for_all()
if processes.rank == 1:
    time.sleep(6)
processes.wait_for_all()
print(f"<rank {processes.rank} arrived>", flush=True)
"""


@pytest.mark.dist
def test_ranks_share_a_drawn_seed_and_wait_longer_than_a_collective_may(tmp_path):
    """Otherwise each has an order of its own, and caching a large folder ends in a time-out."""
    script = tmp_path / "script.py"
    script.write_text(SEEDS_AND_WAITING)
    done = launch(script, [str(ROOT)], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    # two processes may write into one line
    seeds = re.findall(r"<seed (\d+)>", done.stdout)
    assert len(seeds) == 2 and seeds[0] == seeds[1]
    assert "<rank 0 arrived>" in done.stdout and "<rank 1 arrived>" in done.stdout


def test_a_folder_that_another_rank_begins_to_use(tmp_path, monkeypatch):
    """Looking whether a folder can be made leaves it alone once something is in it."""
    make = Path.mkdir

    def make_and_use(folder, *arguments, **named):
        make(folder, *arguments, **named)
        (folder / "of another rank").touch()

    monkeypatch.setattr(Path, "mkdir", make_and_use)
    assert checks._folder_problems("--output_dir", str(tmp_path / "out")) == []
    assert (tmp_path / "out" / "of another rank").is_file()


@pytest.mark.dist
def test_two_ranks_go_on_from_the_state_of_one_process(inputs, tmp_path):
    """Positions count batches over all processes: two ranks take what accumulation two would have taken."""

    def arguments(name, steps, accumulation):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        toml = dataset_toml(folder, inputs, batch_size=2, subset="flip_aug = true\nshuffle_caption = true")
        more = ("--gradient_accumulation_steps", accumulation, "--network_train_unet_only", "--cache_latents")
        given = network_arguments("flux", inputs, folder, toml, *more, "--resume", "auto")
        given[given.index("--max_train_steps") + 1] = steps
        return [*given, "--save_state_on_train_end"]

    run_training("flux", arguments("straight", "6", "2"))
    run_training("flux", arguments("split", "2", "2"))
    done = launch("flux_train_network.py", arguments("split", "6", "1"), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, split = (
        [event["loss"] for event in events(tmp_path / name / "out") if event["event"] == "step"]
        for name in ("straight", "split")
    )
    assert split == pytest.approx(straight, rel=1e-5)
    a, b = (load_file(tmp_path / name / "out" / "last.safetensors") for name in ("straight", "split"))
    error = sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
    assert error <= 1e-3 * sum(float(a[name].square().sum()) for name in a if "lora_up" in name) ** 0.5
