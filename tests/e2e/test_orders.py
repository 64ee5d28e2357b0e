"""Killed, stopped and ordered about from outside: what a run leaves, and how it goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.runs import dataset_toml, network_arguments

from library.base.safetensors_io import load_file, read_header

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sd": "train_network.py", "flux": "flux_train_network.py"}
VARIED = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2\n"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
pytestmark = pytest.mark.e2e


class Run:
    """A training in a process of its own."""

    def __init__(self, family, inputs, folder, *more, processes=1, stdin=None, steps=400):
        folder.mkdir(exist_ok=True)
        self.out = folder / "out"
        self.control = self.out / "last.control"
        toml = dataset_toml(folder, inputs, batch_size=2, subset=VARIED)
        arguments = network_arguments(family, inputs, folder, toml, *more)
        arguments[arguments.index("--max_train_steps") + 1] = str(steps)
        command = [sys.executable, SCRIPTS[family], *arguments]
        if processes > 1:
            launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
            launcher += ["--dynamo_backend", "no", "--num_processes", str(processes), "--multi_gpu"]
            command = [sys.executable, *launcher, SCRIPTS[family], *arguments]
        self.log = folder / "stderr.txt"
        self.opened = open(self.log, "w")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stderr=self.opened, stdin=stdin, text=True, start_new_session=True
        )

    def said(self):
        return self.log.read_text(errors="replace")

    def events(self, kind="step"):
        path = self.out / "last_events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, filter(complete, lines)) if event["event"] == kind]

    def until(self, condition, seconds=90):
        """Wait for something to be true; a run that ended before has failed."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()[-3000:]
            assert self.process.poll() is None, self.said()[-3000:]
            time.sleep(0.01)
        return self

    def stepping(self, count=2):
        return self.until(lambda: len(self.events()) >= count)

    def further(self, count):
        """Until so many steps are logged in all; what a kill had cut off counts anew."""
        resumed = self.until(lambda: self.events("resume") or self.events("start"))
        return resumed.until(lambda: len(self.events()) >= count, 120)

    def order(self, *lines):
        """As a user would: `echo verb >> last.control`."""
        with open(self.control, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def pid(self):
        """Of the process that trains, as the run says it."""
        (line,) = [line for line in self.said().splitlines() if "process " in line and "Ctrl+C or SIGTERM" in line]
        return int(line.split("process ")[1].split(":")[0])

    def ended(self, seconds=90):
        code = self.process.wait(seconds)
        self.opened.close()
        return code

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.opened.close()


def complete(line):
    return line.endswith("}")


def states(out):
    return sorted(path.name for path in out.glob("*-state"))


def whole(folder):
    """Every file under its final name can be read."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # what was being written
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def recorded(folder):
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["image_keys"], line["captions"], line["flipped"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_killed_twenty_times_equals_never(family, inputs, tmp_path):
    more = ("--max_data_loader_n_workers", "4", "--network_dropout", "0.1", "--gradient_accumulation_steps", "2")
    more += ("--save_every_n_steps", "3", "--save_state", "--save_last_n_steps_state", "6")

    def begin(name):
        record = ("--record_steps", str(tmp_path / name / "record"), "--resume", "auto")
        return Run(family, inputs, tmp_path / name, *more, *record, steps=60)

    straight = begin("straight")
    assert straight.ended(300) == 0, straight.said()[-2000:]
    chance = random.Random(7)
    in_saves = 0
    for number in range(20):
        run = begin("killed")
        before = len(run.events())  # the run gets a little further every time
        if number % 3:
            run.further(before + chance.randint(1, 3))
            time.sleep(chance.random() * 0.2)
        else:  # every third kill hits a save
            run.until(lambda run=run: any(run.out.glob(".last-step*.tmp")), 120)
            in_saves += 1
        run.kill()
        whole(run.out)
    assert in_saves == 7
    last = begin("killed")
    assert last.ended(300) == 0, last.said()[-2000:]
    assert recorded(tmp_path / "killed" / "record") == recorded(tmp_path / "straight" / "record")
    assert [e["loss"] for e in last.events()] == [e["loss"] for e in straight.events()]
    for name in ("last.safetensors", "last-step00000030.safetensors", "last-step00000060.safetensors"):
        ours, theirs = load_file(last.out / name), load_file(straight.out / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        a, b = read_header(last.out / name)[1], read_header(straight.out / name)[1]
        differs = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
        assert differs <= {
            "ss_session_id",
            "ss_training_started_at",
            "ss_training_finished_at",
            "modelspec.date",
            "sshs_model_hash",  # of the file with its times
        }
    assert states(last.out) == states(straight.out)
    assert not list(last.out.glob(".*.tmp")) and not list(last.out.glob(".*.old"))


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGINT)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(number, processes, inputs, tmp_path):
    run = Run("flux", inputs, tmp_path, "--network_train_unet_only", "--cache_latents", processes=processes).stepping()
    os.kill(run.pid(), number)
    code = run.ended()
    assert code == 128 + number if processes == 1 else code != 0
    assert "go on with --resume auto" in run.said() and "Traceback" not in run.said().split("go on with")[0]
    (name,) = states(run.out)
    step = json.loads((run.out / name / "state.json").read_text())["step"]
    assert name == f"last-step{step:08d}-state" and step == run.events()[-1]["step"]
    assert not (run.out / "last.safetensors").exists()
    again = Run("flux", inputs, tmp_path, "--network_train_unet_only", "--resume", "auto", steps=step + 3)
    assert again.ended() == 0, again.said()[-2000:]
    assert [event["step"] for event in again.events()] == list(range(1, step + 4))
    assert [event["step"] for event in again.events("resume")] == [step]


def test_a_second_signal_ends_at_once(inputs, tmp_path):
    run = Run("sd", inputs, tmp_path, "--gradient_accumulation_steps", "40").until(
        lambda: "Ctrl+C or SIGTERM" in (tmp_path / "stderr.txt").read_text()
    )
    time.sleep(0.5)
    os.kill(run.process.pid, signal.SIGTERM)
    run.until(lambda: "once more stops at once" in run.said())
    os.kill(run.process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert run.ended(5) == 143
    assert time.monotonic() - started < 3
    assert states(run.out) == []


def test_a_run_whose_launcher_is_gone_saves_and_stops(inputs, tmp_path):
    run = Run("flux", inputs, tmp_path, "--network_train_unet_only", processes=2).stepping()
    trainer = run.pid()
    os.kill(run.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not states(run.out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(states(run.out)) == 1, run.said()[-2000:]
    assert "the launcher is gone" in run.said()
    while time.monotonic() < deadline:
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the training goes on")
    run.process.wait()


@pytest.mark.parametrize("processes", [1, 2])
def test_every_order_is_followed(processes, inputs, tmp_path):
    """Through the control file, observed from outside."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    more = ("--sample_prompts", str(prompts), "--network_train_unet_only", "--validation_split", "0.2")
    run = Run("flux", inputs, tmp_path, *more, "--cache_latents", processes=processes, steps=100_000).stepping()
    run.order("save", "save_state", "sample", "eval", "lr 5e-4", "status")
    run.until(lambda: "learning rate set to 0.0005" in run.said())
    run.until(lambda: list(run.out.glob("last-step*.safetensors")) and states(run.out))
    run.until(lambda: list((run.out / "sample").glob("*.png")) and run.events("validation"))
    assert "heard: lr 5e-4" in run.said() and " of 100000, epoch " in run.said()
    run.stepping(len(run.events()) + 3)
    assert run.events()[-1]["lr/unet"] == 5e-4
    # mistakes are answered
    run.order("sav", "lr fast", "lr", "at soon save", "")
    run.until(lambda: "did you mean save?" in run.said() and "lr fast: expected a number" in run.said())
    # pause stops the steps, resume lets them go on
    run.order("pause")
    run.until(lambda: "paused at step" in run.said())
    time.sleep(0.3)
    count = len(run.events())
    time.sleep(0.7)
    assert len(run.events()) == count
    run.order("status", "resume")
    run.stepping(count + 3)
    # later orders wait for their step
    step = run.events()[-1]["step"] + 40
    run.order(f"at {step} quit")
    assert run.ended() == 0, run.said()[-2000:]
    final = json.loads((run.out / states(run.out)[-1] / "state.json").read_text())["step"]
    assert step <= final <= step + 2
    assert "stopped at step" in run.said() and "go on with --resume auto" in run.said()


@pytest.mark.parametrize("processes", [1, 2])
def test_abort_saves_nothing(processes, inputs, tmp_path):
    run = Run("flux", inputs, tmp_path, "--network_train_unet_only", "--cache_latents", processes=processes).stepping()
    run.order("sample", "eval")
    run.until(
        lambda: "sample: nothing to do (no --sample_prompts)" in run.said() and "eval: nothing to do" in run.said()
    )
    run.order("abort")
    assert run.ended() == 0
    assert "without saving" in run.said() and not states(run.out)
    assert not list(run.out.glob("*.safetensors"))


def test_orders_from_stdin_and_a_flood_of_them(inputs, tmp_path):
    more = ("--interactive", "--network_train_unet_only", "--cache_latents")
    run = Run("flux", inputs, tmp_path, *more, stdin=subprocess.PIPE, steps=100_000).stepping()
    run.process.stdin.write("status\n" + "nonsense\n" * 10_000)
    run.process.stdin.flush()
    run.until(lambda: "step " in run.said() and "nonsense: not understood" in run.said())
    run.order(*["more nonsense"] * 10_000)
    run.until(lambda: "only the first 200 are read" in run.said())
    count = len(run.events())
    run.stepping(count + 20)
    deadline = time.monotonic() + 60
    while run.process.poll() is None and time.monotonic() < deadline:
        run.process.stdin.write("quit\n")
        run.process.stdin.flush()
        time.sleep(0.3)
    assert run.ended() == 0
    assert states(run.out) and "Traceback" not in run.said()


def test_orders_to_an_earlier_run_are_not_followed(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.control").write_text("abort\n")
    run = Run("flux", inputs, tmp_path, "--network_train_unet_only", "--cache_latents", steps=3)
    assert run.ended() == 0
    assert (run.out / "last.safetensors").exists()


def test_a_second_run_with_the_same_output_is_refused(inputs, tmp_path):
    """At once, before it loads anything; the first goes on. When the first is killed, its lock goes with it."""
    first = Run("flux", inputs, tmp_path, "--network_train_unet_only", "--cache_latents", steps=100_000).stepping()
    more = ("--network_train_unet_only", "--output_dir", str(first.out))
    second = Run("flux", inputs, tmp_path / "second", *more, steps=2)
    assert second.ended() == 2
    assert "another run is writing results named 'last' there; wait for it, or choose another" in second.said()
    assert "Traceback" not in second.said() and "error: --output_dir" in second.said()
    other = Run("flux", inputs, tmp_path / "other", *more, "--output_name", "other", steps=2)
    assert other.ended() == 0, other.said()[-2000:]
    first.stepping(len(first.events()) + 5)
    first.kill()
    third = Run("flux", inputs, tmp_path / "third", *more, steps=2)
    assert third.ended() == 0, third.said()[-2000:]
