"""What goes wrong for reasons outside the program: one line that says what to do, exit code 2, nothing half written."""

import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.runs import FAMILY_OF, dataset_toml, network_arguments

from library.base.safetensors_io import load_file
from library.train_util import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT_OF = {family: script for script, family in FAMILY_OF.items()}
pytestmark = pytest.mark.e2e

# words of an instruction; saying what a flag or file should have been counts too
INSTRUCTION = re.compile(
    r"\b(use|name|choose|copy|download|convert|lower|raise|try|make room|remove|wait|needs?|needed|leave|"
    r"this version (trains|reads))\b"
)
EXPECTED = re.compile(
    r"error: --\w+ = .*: (holds no |no such file|cannot be made: .* is a file)|is an? .*, not the |of this model\b"
)
# a limit on the size of files makes writing fail as a full disk or a quota does
LIMITED = (
    "import resource, runpy, sys; limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)

Ended = namedtuple("Ended", "code stderr")


def environment():
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run_with_file_limit(family, limit, arguments):
    """Train where no file can grow beyond `limit` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), SCRIPT_OF[family], *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Ended(done.returncode, done.stderr)


def with_flags(arguments, **values):
    """The arguments with other values of flags that are among them, or with further flags."""
    changed = list(arguments)
    for name, value in values.items():
        flag = f"--{name}"
        if flag in changed:
            changed[changed.index(flag) + 1] = str(value)
        else:
            changed += [flag, str(value)]
    return changed


@pytest.fixture
def train(capsys):
    """Run a script's main function here; anything but an orderly end fails the test with its traceback."""

    def run(family, arguments):
        capsys.readouterr()
        code = 0
        try:
            main(family, "network", argv=[str(part) for part in arguments])
        except SystemExit as end:
            code = end.code
        return Ended(code, capsys.readouterr().err)

    return run


@pytest.fixture
def train_with_limit(train):
    """As `train`, where no file can grow beyond a number of bytes; starts no process and is quick."""

    def run(family, limit, arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return train(family, arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return run


@pytest.fixture
def arguments_of(inputs, tmp_path):
    """Arguments of one step of training."""

    def make(family, **values):
        toml = values.get("dataset_config") or dataset_toml(tmp_path, inputs)
        arguments = network_arguments(family, inputs, tmp_path, toml)
        return with_flags(arguments, **{"max_train_steps": 1, **values})

    return make


def error_lines(ended):
    return [line for line in ended.stderr.splitlines() if line.startswith("error: ")]


def assert_explained(ended, *names):
    """Exit code 2 and a line that names the file or flag and says what to do."""
    assert "Traceback" not in ended.stderr, ended.stderr[-2500:]
    lines = error_lines(ended)
    assert ended.code == 2, ended.stderr[-2500:]
    named = [line for line in lines if all(str(name) in line for name in names)]
    assert named, lines
    assert any(INSTRUCTION.search(line) or EXPECTED.search(line) for line in named), f"no remedy in {named}"


def assert_nothing_half_written(folder):
    if not folder.is_dir():
        return
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".taken", ".old"))]
    for path in folder.rglob("*.safetensors"):
        load_file(path)
    for path in folder.rglob("*.npz"):
        with np.load(path) as arrays:
            assert all(arrays[name] is not None for name in arrays.files)


def results(folder):
    """Content of every result and state in a folder."""
    kept = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in kept if path.suffix == ".safetensors" or "-state" in str(path.parent)}


def own_images(inputs, folder, names=("cat.png", "coffee.jpg", "rocket.webp")):
    """A dataset of a few images that a test may damage; (folder of images, dataset file)."""
    images = folder / "own" / "img"
    images.mkdir(parents=True)
    for name in names:
        source = inputs.folder / "data" / "img" / name
        shutil.copy(source, images)
        shutil.copy(source.with_suffix(".txt"), images)
    toml = dataset_toml(images.parent, inputs)
    toml.write_text(toml.read_text().replace(str(inputs.folder / "data" / "img"), str(images)))
    return images, toml


# --- the disk is full, folders that cannot be written ----------------------------------------------------------------


@pytest.fixture
def finished(train, arguments_of, tmp_path):
    """A finished run with a state; its results."""
    arguments = [*arguments_of("flux"), "--save_state_on_train_end"]
    assert train("flux", arguments).code == 0
    before = results(tmp_path / "out")
    assert len(before) > 3
    return before


@pytest.mark.parametrize(
    ("share", "more", "refused"),
    [
        (0.5, ["--save_every_n_steps", "1"], "last-step00000001.safetensors"),
        (0.5, [], "last.safetensors"),
        (0.5, ["--save_every_n_steps", "1", "--save_model_as", "pt"], "last-step00000001.pt"),
        # the adapter finds room, the optimizer's two numbers for each of its own do not
        (1.5, ["--save_state_on_train_end", "--output_name", "other"], "other-state"),
        (1.5, ["--save_state_on_train_end"], "last-state"),
    ],
    ids=["step", "final", "torch format", "state", "state of the same name"],
)
def test_a_full_disk_stops_with_a_remedy_and_leaves_earlier_results(
    share, more, refused, finished, train_with_limit, arguments_of, tmp_path
):
    out = tmp_path / "out"
    limit = int(share * len(finished[out / "last.safetensors"]))
    ended = train_with_limit("flux", limit, [*arguments_of("flux"), *more])
    assert_explained(ended, out / refused, "cannot be written", "make room")
    assert_nothing_half_written(out)
    after = results(out)
    final_was_written = share > 1 and "--output_name" not in more
    for path, content in finished.items():
        if not (final_was_written and path == out / "last.safetensors"):
            assert after[path] == content
    assert not (out / refused).exists() or refused in ("last.safetensors", "last-state")


@pytest.mark.parametrize("limit", [0, 100_000], ids=["no room at all", "no room for the adapter"])
def test_a_script_on_a_full_disk_ends_with_one_line_and_code_2(limit, arguments_of, tmp_path):
    ended = run_with_file_limit("flux", limit, [*arguments_of("flux"), "--save_every_n_steps", "1"])
    assert_explained(ended, tmp_path / "out", "cannot be written")
    assert len(error_lines(ended)) == 1
    assert_nothing_half_written(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_full_disk_while_caching_stops_with_a_remedy(kind, train_with_limit, inputs, arguments_of, tmp_path):
    images, toml = own_images(inputs, tmp_path)
    flags = {
        "latents": ["--cache_latents_to_disk"],
        "text": ["--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"],
    }[kind]
    ended = train_with_limit("flux", 4000, [*arguments_of("flux", dataset_config=toml), *flags])
    assert_explained(ended, images, "cannot be written")
    assert_nothing_half_written(images)


def test_a_full_disk_while_recording_stops_with_a_remedy(train_with_limit, arguments_of, tmp_path):
    ended = train_with_limit("flux", 4000, arguments_of("flux", record_steps=tmp_path / "record"))
    assert_explained(ended, tmp_path / "record", "cannot be written")
    assert_nothing_half_written(tmp_path / "record")


def test_bad_numbers_are_reported_although_their_record_finds_no_room(train_with_limit, arguments_of, tmp_path):
    arguments = arguments_of("flux", learning_rate=1e30)
    ended = train_with_limit("flux", 4000, with_flags(arguments, max_train_steps=3))
    assert_explained(ended, "gradients are no numbers", "--nan_policy skip")
    assert_nothing_half_written(tmp_path / "out")


@pytest.mark.parametrize("flag", ["output_dir", "logging_dir", "record_steps"])
@pytest.mark.parametrize("place", ["below a file", "in a system folder"])
def test_a_folder_that_cannot_be_made_is_named(flag, place, train, arguments_of, tmp_path):
    file = tmp_path / "a_file"
    file.write_text("kept")
    folder = file / "below" if place == "below a file" else Path("/proc/nowhere/below")
    assert_explained(train("flux", arguments_of("flux", **{flag: folder})), f"--{flag}", folder)
    assert file.read_text() == "kept"
    assert_nothing_half_written(tmp_path / "out")


# --- damaged and foreign model files ---------------------------------------------------------------------------------

PARTS = [
    ("sd", "pretrained_model_name_or_path", "sd15"),
    ("sd", "vae", "ae"),
    ("flux", "pretrained_model_name_or_path", "flux1_dev"),
    ("flux", "clip_l", "clip_l"),
    ("flux", "t5xxl", "t5xxl"),
    ("flux", "ae", "ae"),
]


def damaged(kind, whole, target):
    """A damaged copy of a file."""
    data = Path(whole).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    content = {
        "truncated": data[: len(data) // 2],
        "truncated header": data[: 8 + length // 2],
        "empty": b"",
        "random": np.random.default_rng(1).bytes(5000),
        "web page": b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>\n" * 20,
        "header is a list": struct.pack("<Q", 2) + b"[]",
        "header holds a number": struct.pack("<Q", 8) + b'{"a": 1}',
        "negative size": struct.pack("<Q", len(header) + 1) + header.replace(b"[2]", b"[-2]") + b"\0" * 8,
        "overlong": data + b"more",
    }[kind]
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("kind", ["truncated", "empty", "random", "web page"])
@pytest.mark.parametrize(("family", "flag", "model"), PARTS, ids=[f"{part[0]}-{part[1]}" for part in PARTS])
def test_a_damaged_model_file_is_named_with_a_remedy(family, flag, model, kind, train, arguments_of, inputs, tmp_path):
    file = damaged(kind, inputs.model(model), tmp_path / "damaged.safetensors")
    assert_explained(train(family, arguments_of(family, **{flag: file})), "damaged.safetensors")
    assert_nothing_half_written(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "kind", ["truncated header", "header is a list", "header holds a number", "negative size", "overlong"]
)
def test_a_damaged_header_is_named_with_a_remedy(kind, train, arguments_of, inputs, tmp_path):
    file = damaged(kind, inputs.model("clip_l"), tmp_path / "damaged.safetensors")
    assert_explained(train("flux", arguments_of("flux", clip_l=file)), "damaged.safetensors")


@pytest.mark.parametrize(("family", "flag", "model"), PARTS, ids=[f"{part[0]}-{part[1]}" for part in PARTS])
@pytest.mark.parametrize("every", [2, 3])
def test_a_model_file_without_some_tensors_is_named(family, flag, model, every, train, arguments_of, inputs, tmp_path):
    """A converter that forgot a part: half of the tensors, or all but every third, but not the ones that tell it."""
    marks = ("input_blocks.0.0.weight", "query_norm.scale", "encoder.conv_in.weight", "layers.0.mlp.fc1.weight")
    tensors = load_file(inputs.model(model))
    kept = {
        name: tensor
        for number, (name, tensor) in enumerate(tensors.items())
        if name.endswith((*marks, "encoder.block.0.layer.0.SelfAttention.q.weight")) or number % every
    }
    file = tmp_path / "incomplete.safetensors"
    save_file(kept, file)
    ended = train(family, arguments_of(family, **{flag: file}))
    assert ended.code == 2
    assert any("incomplete.safetensors" in line for line in error_lines(ended)), ended.stderr[-2000:]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def lora_file(folder):
    """An adapter of FLUX in the customary layout."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    save_file({**tensors, f"{name}.alpha": torch.tensor(4.0)}, folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors")


def sdxl_file(folder, inputs):
    """The header of an SDXL checkpoint has the embedding of sizes that no other has."""
    tensors = load_file(inputs.model("sd15"))
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "xl.safetensors")
    return str(folder / "xl.safetensors")


@pytest.mark.parametrize(
    ("family", "flag", "model", "says"),
    [
        ("sd", "pretrained_model_name_or_path", "xl", "SDXL"),
        ("sd", "pretrained_model_name_or_path", "flux1_dev", "Stable Diffusion"),
        ("sd", "pretrained_model_name_or_path", "clip_l", "Stable Diffusion"),
        ("sd", "pretrained_model_name_or_path", "adapter", "Stable Diffusion"),
        ("sd", "vae", "clip_l", "VAE"),
        ("sd", "vae", "adapter", "VAE"),
        ("flux", "pretrained_model_name_or_path", "sd15", "FLUX"),
        ("flux", "pretrained_model_name_or_path", "clip_l", "CLIP"),
        ("flux", "pretrained_model_name_or_path", "t5xxl", "T5"),
        ("flux", "pretrained_model_name_or_path", "ae", "autoencoder"),
        ("flux", "pretrained_model_name_or_path", "adapter", "FLUX"),
        ("flux", "clip_l", "ae", "CLIP"),
        ("flux", "clip_l", "t5xxl", "CLIP"),
        ("flux", "t5xxl", "clip_l", "T5"),
        ("flux", "t5xxl", "flux1_dev", "T5"),
        ("flux", "ae", "t5xxl", "autoencoder"),
        ("flux", "ae", "sd15", "autoencoder"),
        ("flux", "clip_l", "sd15", "CLIP"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_is_needed(
    family, flag, model, says, train, arguments_of, inputs, tmp_path
):
    made = {"adapter": lambda: lora_file(tmp_path), "xl": lambda: sdxl_file(tmp_path, inputs)}
    file = made[model]() if model in made else inputs.model(model)
    assert_explained(train(family, arguments_of(family, **{flag: file})), Path(file).name, says)
    assert not list((tmp_path / "out").glob("*.safetensors"))


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["torch", "torch before 1.6", "pickle"])
@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "vae", "network_weights", "base_weights"])
def test_code_in_a_checkpoint_is_refused_and_never_run(form, flag, train, arguments_of, tmp_path):
    marker, file = tmp_path / "was_run", tmp_path / "code.ckpt"
    content = {"state_dict": {"a": torch.zeros(2)}, "code": _Code(f"touch {marker}")}
    if form == "pickle":
        file.write_bytes(pickle.dumps({"code": _Code(f"touch {marker}")}, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    ended = train("sd", arguments_of("sd", **{flag: file}))
    assert not marker.exists()
    assert_explained(ended, "code.ckpt", "safetensors")


@pytest.mark.parametrize("content", ["a list", "a tensor", "numbers", "empty", "web page"])
def test_a_torch_file_without_named_tensors_is_refused(content, train, arguments_of, inputs, tmp_path):
    file = tmp_path / "other.ckpt"
    if content in ("empty", "web page"):
        damaged(content, inputs.model("ae"), file)
    else:
        torch.save({"a list": [1, 2], "a tensor": torch.zeros(3), "numbers": {1: 2}}[content], file)
    assert_explained(train("sd", arguments_of("sd", pretrained_model_name_or_path=file)), "other.ckpt")


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_gradients_without_numbers_stop_and_leave_a_record_of_the_step(train, arguments_of, tmp_path):
    out = tmp_path / "out"
    arguments = with_flags(arguments_of("flux"), learning_rate=1e30, max_train_steps=6, save_every_n_steps=1)
    ended = train("flux", arguments)
    assert_explained(ended, "--nan_policy skip", "last_nan_step")
    step = int(re.search(r"error: step (\d+): ", ended.stderr)[1])
    folder = out / f"last_nan_step{step:08d}"
    assert str(folder) in ended.stderr
    assert json.loads((folder / "meta.json").read_text())["family"] == "flux"
    (line,) = (folder / "steps.jsonl").read_text().splitlines()
    assert json.loads(line)["image_keys"][0] in ended.stderr
    tensors = load_file(folder / "step_000000.safetensors")
    assert {"latents", "noise", "noisy", "timesteps"} <= set(tensors)
    assert_nothing_half_written(out)
    assert len(list(out.glob("last-step*.safetensors"))) == step - 1
    assert not (out / "last.safetensors").exists()


def test_a_cache_without_numbers_stops_or_is_skipped_and_its_image_is_named(train, arguments_of, inputs, tmp_path):
    images, toml = own_images(inputs, tmp_path)
    arguments = [*arguments_of("flux", dataset_config=toml), "--cache_latents_to_disk"]
    assert train("flux", arguments).code == 0
    cache = next(images.glob("coffee*_flux.npz"))
    with np.load(cache) as file:
        arrays = dict(file)
    np.savez(cache, **{name: a * np.nan if name.startswith("latents") else a for name, a in arrays.items()})
    shutil.rmtree(tmp_path / "out")

    arguments = [*with_flags(arguments, max_train_steps=6), "--skip_cache_check"]
    assert_explained(train("flux", arguments), "coffee.jpg", "--nan_policy skip")
    assert not list((tmp_path / "out").glob("*.safetensors"))

    ended = train("flux", [*arguments, "--nan_policy", "skip"])
    assert ended.code == 0, ended.stderr[-2000:]
    skipped = re.findall(r"step (\d+): gradients are no numbers, skipped \(images: (.*)\)", ended.stderr)
    assert [image for _, image in skipped] == ["coffee.jpg"] * 2
    saved = load_file(tmp_path / "out" / "last.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_up" in name)


# --- adapter files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "random", "web page", "base model", "other family"])
@pytest.mark.parametrize("flag", ["network_weights", "base_weights"])
def test_an_adapter_file_that_cannot_be_used_is_named(flag, kind, train, arguments_of, inputs, tmp_path):
    file = tmp_path / "start.safetensors"
    if kind == "base model":
        shutil.copy(inputs.model("sd15"), file)
    elif kind == "other family":
        shutil.copy(lora_file(tmp_path), file)
    elif kind != "missing":
        damaged(kind, lora_file(tmp_path), file)
    ended = train("sd", arguments_of("sd", **{flag: file}))
    assert_explained(ended, "start.safetensors")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_of_another_rank_is_refused_and_left_as_it_is(train, arguments_of, tmp_path):
    out = tmp_path / "out"
    assert train("flux", arguments_of("flux")).code == 0
    before = results(out)
    arguments = with_flags(arguments_of("flux"), network_dim=8, network_weights=out / "last.safetensors")
    assert_explained(train("flux", arguments), "last.safetensors", "--dim_from_weights", "--network_dim 4")
    assert results(out) == before


# --- two runs of one name --------------------------------------------------------------------------------------------


def test_a_second_run_of_the_same_name_is_refused_and_the_first_ends_well(train, arguments_of, tmp_path):
    out = tmp_path / "out"
    arguments = [*with_flags(arguments_of("flux"), max_train_steps=3, save_every_n_steps=1), "--interactive"]
    first = subprocess.Popen(
        [sys.executable, SCRIPT_OF["flux"], *arguments],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        first.stdin.write("pause\n")
        first.stdin.flush()
        seen = []
        for line in first.stderr:
            seen.append(line)
            if "paused at step" in line:
                break
        assert first.poll() is None, "".join(seen)
        before = results(out)
        assert before
        ended = train("flux", arguments_of("flux"))
        assert_explained(ended, "--output_dir", out, "another run", "--output_name")
        assert results(out) == before
        _, stderr = first.communicate("resume\n", timeout=100)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 0, stderr[-2000:]
    assert "Traceback" not in stderr
    assert_nothing_half_written(out)
    assert {path.name for path in out.glob("*.safetensors")} == {
        "last.safetensors",
        *(f"last-step{step:08d}.safetensors" for step in (1, 2, 3)),
    }
