"""Every available training script through a real `accelerate launch`, with the recipe of its family."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.runs import (
    FAMILY,
    FAMILY_OF,
    MODEL_FLAGS,
    MORE_FLAGS,
    NETWORK_MODULES,
    Inputs,
    dataset_toml,
    events,
    network_arguments,
    run_training,
)

from library.base.safetensors_io import load_file
from library.families import FAMILIES
from library.train_util import load_family

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
pytestmark = pytest.mark.e2e


def run(command, **kwargs):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False, **kwargs
    )


def launch(script, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    return run([*command, "--mixed_precision", "no", "--dynamo_backend", "no", script, *arguments])


# recipe -> the tiny model that stands for the one it names
RECIPES = {
    "sd15_lora": "sd",
    "sdxl_lora": "sdxl",
    "sd3_lora": "sd35",
    "flux_lora": "flux",
    "chroma_lora": "chroma",
    "lumina_lora": "lumina",
    "anima_lora": "anima",
    "hunyuan_image_lora": "hunyuan_image",
}
MORE_THAN_A_RUN = ("sd15_lora", "flux_lora")
ONLY_PLANNED = ("chroma_lora",)  # the script of FLUX.1, which is launched for that


def command_of(recipe):
    """The script that the first line of a recipe names, and the recipe."""
    words = (CONFIGS / f"{recipe}.toml").read_text(encoding="utf-8").splitlines()[0].split()
    assert words[:3] == ["#", "accelerate", "launch"] and words[4:] == ["--config_file", f"configs/{recipe}.toml"]
    return words[3]


def recipe_arguments(recipe, inputs, folder, images, **dataset):
    """A recipe as it is, but for file names, an epoch over so many images, and the number format of the CPU."""
    data = folder / "data" / "img"
    data.mkdir(parents=True)
    names = sorted(path for path in (inputs.folder / "data" / "img").iterdir() if path.suffix != ".txt")[:images]
    for path in names:
        for one in (path, path.with_suffix(".txt")):
            shutil.copy(one, data)
    model = RECIPES[recipe]
    more = MORE_FLAGS.get(model, ())
    short = [part for pair in pairwise(more) for part in pair if pair[0].endswith("max_token_length")]
    files = [part for flag, name in MODEL_FLAGS[model].items() for part in (flag, inputs.model(name))]
    return [
        *("--config_file", str(CONFIGS / f"{recipe}.toml"), *files, *short),
        *("--tokenizer_cache_dir", str(inputs.folder / "tokenizers")),
        *("--dataset_config", str(dataset_toml(folder, Inputs(folder), **dataset))),
        *("--output_dir", str(folder / "out"), "--output_name", "last"),
        *("--max_train_epochs", "1", "--mixed_precision", "no"),
    ]


def test_every_recipe_and_every_script_is_here():
    assert set(RECIPES) == {path.stem for path in CONFIGS.glob("*.toml")} - {"dataset"}
    launched = {command_of(recipe) for recipe in set(RECIPES) - set(ONLY_PLANNED)}
    assert {FAMILY_OF[script] for script in launched} == {
        name for name in FAMILIES if "network" in load_family(name).available_tasks
    }
    assert all((ROOT / script).is_file() for script in launched)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_planned(recipe, inputs, tmp_path, messages):
    """With the script that the recipe names; its own settings reach the plan."""
    assert FAMILY_OF[command_of(recipe)] == FAMILY.get(RECIPES[recipe], RECIPES[recipe])
    outcome = run_training(RECIPES[recipe], [*recipe_arguments(recipe, inputs, tmp_path, 2), "--dry_run"])
    assert outcome.state is None and "--dry_run: stopped before training" in messages.text
    assert f"{NETWORK_MODULES[RECIPES[recipe]]}, dim 16, alpha" in messages.text
    assert "2 (2 per epoch, 1 epochs)" in messages.text
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in (*MORE_THAN_A_RUN, *ONLY_PLANNED)])
def test_recipes_run(recipe, inputs, tmp_path):
    """Two steps, and an adapter that learned something."""
    arguments = recipe_arguments(recipe, inputs, tmp_path, 2)
    done = launch(command_of(recipe), *arguments, "--max_data_loader_n_workers", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_file(tmp_path / "out" / "last.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_up" in name)
    assert [event["step"] for event in events(tmp_path / "out") if event["event"] == "step"] == [1, 2]


@pytest.mark.parametrize("recipe", MORE_THAN_A_RUN)
def test_launch(recipe, inputs, tmp_path):
    """Data with workers, caches, samples, validation, saving, logs."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    varied = {"dataset": "validation_split = 0.2", "subset": "flip_aug = true"}
    done = launch(
        command_of(recipe),
        *recipe_arguments(recipe, inputs, tmp_path, 5, **varied),
        *("--sample_prompts", str(prompts), "--sample_every_n_steps", "4", "--save_every_n_steps", "2"),
        *("--max_data_loader_n_workers", "2", "--gradient_checkpointing", "--logging_dir", str(tmp_path / "logs")),
    )
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
