"""Install everything into .venv, then watch a FLUX.1 LoRA train on real photographs.

    python quickstart.py            install, then the first training (a few minutes)
    python quickstart.py install    install only
    python quickstart.py test       install, then run the test suite; further arguments go to pytest

Needs Python 3.11, 3.12 or 3.13 and nothing else. Everything goes to .venv and quickstart_output beside this file.
"""

from __future__ import annotations  # an old Python must get far enough to say that it is too old

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
OUTPUT = ROOT / "quickstart_output"
SUPPORTED = ((3, 11), (3, 12), (3, 13))
MARKER = ENVIRONMENT / "quickstart_installed.txt"
RESTARTED = "DIFFUSION_SCRIPTS_QUICKSTART_RESTARTED"
WANTED_DROP = 0.2  # of the validation loss


def say(text: str = "") -> None:
    """One line for the person watching."""
    print(text, flush=True)


def fail(text: str) -> None:
    """Stop with a message."""
    sys.exit(f"quickstart: {text}")


def environment_python() -> Path:
    """The interpreter of .venv."""
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(command: list[str], what: str, **variables: str) -> None:
    """Run a command, its output shown as it comes.

    Args:
        command: program and arguments.
        what: what it does, for the message when it fails.
        variables: environment variables to set.
    """
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if code != 0:
        fail(f"{what} failed (exit code {code}); the lines above say why")


def pinned(package: str) -> str:
    """`package==version` from constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.split("==")[0] == package:
            return line
    return package


def use_supported_python() -> None:
    """Go on in a supported Python when this one is not, or say which are."""
    if sys.version_info[:2] in SUPPORTED:
        return
    have = "{}.{}".format(*sys.version_info[:2])
    if not os.environ.get(RESTARTED):
        launcher = shutil.which("py") if os.name == "nt" else None
        for major, minor in SUPPORTED:
            path = shutil.which(f"python{major}.{minor}")
            command = [path] if path else [launcher, f"-{major}.{minor}"] if launcher else []
            if command and subprocess.run([*command, "-c", ""], capture_output=True, check=False).returncode == 0:
                say(f"this is Python {have}; going on with {' '.join(command)}")
                command += [str(Path(__file__).resolve()), *sys.argv[1:]]
                sys.exit(subprocess.run(command, env={**os.environ, RESTARTED: "1"}, check=False).returncode)
    fail(
        f"needs Python 3.11, 3.12 or 3.13; this is {have}, and no other was found. Install one of them from python.org."
    )


def fingerprint(torch: str, index: str | None) -> str:
    """What an installation depends on besides its extras."""
    digest = hashlib.sha256(f"{torch} {index} {sys.version_info[:2]}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def installed_extras(torch: str, index: str | None) -> list[str]:
    """Extras that .venv holds, if it was installed with the same settings and requirements."""
    if not (MARKER.is_file() and environment_python().is_file()):
        return []
    settings, *extras = MARKER.read_text(encoding="utf-8").split()
    return extras if settings == fingerprint(torch, index) else []


def installed(extras: str, torch: str, index: str | None) -> bool:
    """Whether .venv holds these extras, or those of the tests, which contain all others."""
    return any(name in installed_extras(torch, index) for name in (extras, "test"))


def runs(*arguments: str) -> bool:
    """Whether .venv has a Python that can run something."""
    command = [str(environment_python()), *arguments]
    return environment_python().is_file() and not subprocess.run(command, capture_output=True, check=False).returncode


def create_environment() -> None:
    """Make .venv, or give one that has none a pip; with a remedy when Python's own venv cannot."""
    unusable = not runs("-c", "")
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt", clear=unusable).create(ENVIRONMENT)
    except (subprocess.CalledProcessError, OSError) as error:
        if unusable:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        fail(f"{ENVIRONMENT} could not be made ({error}). On Debian and Ubuntu: apt install {package}")


def other_constraints() -> str:
    """constraints.txt without torch, for a torch that was chosen by hand; returns the file's path."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    path = ENVIRONMENT / "constraints_without_torch.txt"
    path.write_text("".join(line for line in lines if not line.startswith("torch==")), encoding="utf-8")
    return str(path)


def install(extras: str, torch: str, index: str | None) -> None:
    """Create .venv and install into it; nothing to do when that was done with the same settings.

    Args:
        extras: extras of our package, comma-separated.
        torch: "auto", "none" to keep what is installed, or a requirement.
        index: pip index to take torch from.
    """
    if installed(extras, torch, index):
        say(f"installed already: {ENVIRONMENT}")
        return
    started = time.monotonic()
    say(f"installing into {ENVIRONMENT}; this takes minutes the first time")
    before = installed_extras(torch, index)
    MARKER.unlink(missing_ok=True)  # until this is through, nothing is certain
    if not runs("-m", "pip", "--version"):
        create_environment()
    pip = [str(environment_python()), "-m", "pip", "--disable-pip-version-check", "install"]
    if torch != "none":
        requirement = pinned("torch") if torch == "auto" else torch
        if shutil.which("nvidia-smi") and not index:
            say("an NVIDIA GPU is here: pip's default torch is used; --torch-index URL takes it from elsewhere")
        run([*pip, *(["--index-url", index] if index else []), requirement], "installing torch")
    constraints = "constraints.txt" if torch == "auto" and not index else other_constraints()
    run([*pip, "-c", constraints, "-e", f".[{extras}]"], "installing diffusion-scripts")
    MARKER.write_text("\n".join([fingerprint(torch, index), *before, extras]) + "\n", encoding="utf-8")
    say(f"installed in {time.monotonic() - started:.0f} s")


def launch_command() -> list[str]:
    """`accelerate launch` for one process."""
    return [
        *(str(environment_python()), "-m", "accelerate.commands.launch"),
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1"),  # as fast as two for so small a model, also on a busy machine
        "flux_train_network.py",
    ]


def validation_losses() -> list[float]:
    """Validation losses of the finished run, from its event log."""
    log = OUTPUT / "result" / "first_lora_events.jsonl"
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "validation"]


def train() -> None:
    """Make the model and the photographs, train, show what came out."""
    started = time.monotonic()
    say()
    say("1/2  photographs, tokenizers and a tiny FLUX.1 model")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    run(
        [str(environment_python()), "-m", "tools.quickstart_assets", str(OUTPUT)],
        "making the model and the photographs",
    )
    say()
    say("2/2  training a LoRA")
    command = [*launch_command(), "--config_file", str(OUTPUT / "config.toml")]
    say("     accelerate launch " + " ".join(command[3:]))
    device = {} if shutil.which("nvidia-smi") else {"ACCELERATE_USE_CPU": "true"}
    run(command, "training", HF_HUB_OFFLINE="1", **device)
    losses = validation_losses()
    if len(losses) < 2:
        fail("the run left no validation losses; the lines above say why")
    before, after = losses[0], losses[-1]
    show_result(before, after, time.monotonic() - started)
    if after > (1 - WANTED_DROP) * before:
        fail(f"the validation loss fell by less than {WANTED_DROP:.0%}: something is wrong with this installation")


def show_result(before: float, after: float, seconds: float) -> None:
    """What the first training left, and how to go on."""
    result = OUTPUT / "result"
    rows = [
        ("adapter", result / "first_lora.safetensors"),
        ("loss plot", result / "first_lora_loss.png"),
        ("sample images", result / "sample"),
        ("options and dataset", f"{OUTPUT / 'config.toml'}, {OUTPUT / 'dataset.toml'}"),
        ("event log", result / "first_lora_events.jsonl"),
    ]
    say()
    say(f"Done in {seconds:.0f} s. On 4 photographs never trained on, at 4 fixed noise levels with fixed noise,")
    say(f"the loss went from {before:.4f} to {after:.4f} ({after / before - 1:+.1%}).")
    say("The tiny model has random weights, so its images are noise: the falling loss is the point.")
    say("What the run was going to do is in the table 'plan', shown above before its first step.")
    say()
    for name, value in rows:
        say(f"  {name:<20} {value}")
    show_next()


def show_next() -> None:
    """The command for one's own model and photographs."""
    activate = ENVIRONMENT / ("Scripts\\activate" if os.name == "nt" else "bin/activate")
    parts = [
        "accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors",
        "--clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors --ae ae.safetensors",
        "--dataset_config my_dataset.toml --output_dir output --output_name my_lora",
        "--network_dim 16 --learning_rate 1e-4 --max_train_epochs 10 --mixed_precision bf16",
        "--guidance_scale 1.0 --timestep_sampling flux_shift --model_prediction_type raw",
        "--cache_latents --cache_text_encoder_outputs --network_train_unet_only --gradient_checkpointing",
    ]
    say()
    say("With your own model and photographs (each photograph with a caption in a .txt file of the same name):")
    say()
    say(f"  {'' if os.name == 'nt' else 'source '}{activate}")
    say("  " + (" " if os.name == "nt" else " \\\n    ").join(parts))
    say()
    say("my_dataset.toml names the folders and the size: quickstart_output/dataset.toml is an example. More is in")
    say("docs/getting_started.md and docs/training_lora.md.")


def test(arguments: list[str]) -> int:
    """Run the test suite; returns pytest's exit code."""
    # two at a time, each file's tests in one process: models are made once per file
    parallel = ("-n", "2", "--dist", "loadfile")
    command = [str(environment_python()), "-m", "pytest", "-m", "not slow and not gpu", *parallel, *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> None:
    """Entry point."""
    use_supported_python()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # what is not ours goes to pytest whole
    parser.add_argument("what", nargs="?", choices=("train", "install", "test"), default="train", help="default: train")
    parser.add_argument("--torch", default="auto", help="requirement of torch; none keeps what .venv has")
    parser.add_argument("--torch-index", help="pip index to install torch from, e.g. the one for your CUDA version")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.what != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    extras = "tensorboard,quickstart" if arguments.what == "train" else "test"
    install(extras, arguments.torch, arguments.torch_index)
    if arguments.what == "train":
        train()
    if arguments.what == "test":
        sys.exit(test(rest))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("quickstart: stopped")
