"""Every available training script through a real `accelerate launch`; every other one answers with one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import dataset_toml, events, network_arguments

from library.base.safetensors_io import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e


def run(command, **kwargs):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False, **kwargs
    )


def launch(script, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    return run([*command, "--mixed_precision", "no", "--dynamo_backend", "no", script, *arguments])


@pytest.mark.parametrize(("family", "script"), [("sd", "train_network.py"), ("flux", "flux_train_network.py")])
def test_launch(family, script, inputs, tmp_path):
    """Options from a configuration file, data with workers, caches, samples, validation, saving."""
    toml = dataset_toml(tmp_path, inputs, batch_size=2, dataset="validation_split = 0.2", subset="flip_aug = true")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    arguments = network_arguments(family, inputs, tmp_path, toml, "--sample_prompts", str(prompts))
    config = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        name = flag.removeprefix("--")
        number = name in (
            "network_dim",
            "seed",
            "max_train_steps",
            "max_data_loader_n_workers",
            "t5xxl_max_token_length",
        )
        config[name] = int(value) if number else value
    config["network_alpha"], config["learning_rate"] = 2, 1e-3
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    file = tmp_path / "config.toml"
    file.write_text("[any_section]\n" + "\n".join(lines) + "\nsample_every_n_steps = 4\nsave_every_n_steps = 2\n")
    more = ("--max_data_loader_n_workers", "2", "--gradient_checkpointing", "--logging_dir", str(tmp_path / "logs"))
    done = launch(script, "--config_file", str(file), *more)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.safetensors")} == {
        "last.safetensors",
        "last-step00000002.safetensors",
        "last-step00000004.safetensors",
    }
    assert any(tensor.abs().sum() > 0 for name, tensor in load_file(out / "last.safetensors").items() if "up" in name)
    assert [event["step"] for event in events(out) if event["event"] == "step"] == [1, 2, 3, 4]
    assert len(list((out / "sample").iterdir())) == 1
    assert any((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert "validation loss at step 4" in done.stderr


def test_mistakes_are_named_together_and_before_weights_load(inputs, tmp_path):
    """Wrong options, wrong data and wrong files: one line each, exit code 2, no traceback."""
    toml = tmp_path / "dataset.toml"
    toml.write_text("[[datasets]]\nresolutoin = 128\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n")
    arguments = network_arguments("sd", inputs, tmp_path, toml)
    arguments[arguments.index("--pretrained_model_name_or_path") + 1] = inputs.model("ae")
    arguments[arguments.index("--tokenizer_cache_dir") + 1] = str(tmp_path)
    done = run([sys.executable, "train_network.py", *arguments])
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert any("ae_tiny.safetensors: holds no Stable Diffusion U-Net" in line for line in lines)
    assert any("resolutoin: unknown key; did you mean resolution?" in line for line in lines)
    assert "Traceback" not in done.stderr


def test_launcher_passes_our_exit_code_on(tmp_path):
    done = launch("train_network.py", "--network_dimm", "4")
    assert done.returncode != 0
    assert "error: --network_dimm: unknown flag; did you mean --network_dim?" in done.stderr


def test_killed_run_leaves_only_whole_files(inputs, tmp_path):
    """SIGKILL in the middle of saving: whatever has a final name can be read."""
    arguments = network_arguments("sd", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--save_every_n_steps", "1")
    arguments[arguments.index("--max_train_steps") + 1] = "1000"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train_network.py", *arguments],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "step00000005" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = list((tmp_path / "out").glob("*.safetensors"))
    assert len(written) >= 5
    assert all(load_file(path) for path in written)
