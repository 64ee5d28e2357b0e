"""Runs with caches on disk: what they equal, what they redo, what they never load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import Case, dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, save_file_atomic
from library.train_util import cache, parse_options

ROOT = Path(__file__).resolve().parents[2]
VARIED = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.3\nalpha_mask = true\n"
TEXT = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk")
VARIANTS = ("--cache_caption_variants", "3")


class Place:
    """A copy of the photographs that caches may be written beside, and runs over it."""

    def __init__(self, inputs, folder):
        self.inputs, self.folder = inputs, folder
        shutil.copytree(inputs.folder / "data", folder / "data")
        self.images = folder / "data" / "img"

    def run(self, family, *more, name="out", subset="", dataset="", batch_size=2):
        toml = dataset_toml(self.folder, self, subset=subset, dataset=dataset, batch_size=batch_size)
        arguments = network_arguments(family, self.inputs, self.folder, toml, *more)
        arguments[arguments.index("--output_dir") + 1] = str(self.folder / name)
        return run_training(family, arguments), load_file(self.folder / name / "last.safetensors")

    def times(self, pattern="*.npz"):
        return {path.name: path.stat().st_mtime_ns for path in self.images.glob(pattern)}


@pytest.fixture
def place(inputs, tmp_path):
    return Place(inputs, tmp_path)


def assert_same(first, second):
    (outcome_a, tensors_a), (outcome_b, tensors_b) = first, second
    assert outcome_a.losses == outcome_b.losses
    assert outcome_a.validation == outcome_b.validation
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)


@pytest.mark.parametrize("family", ["flux"])
def test_latents_on_disk_in_memory_or_encoded_are_the_same(family, place):
    data = {"subset": VARIED, "dataset": "validation_split = 0.2"}
    plain = place.run(family, **data)
    assert_same(plain, place.run(family, "--cache_latents", **data))
    assert_same(plain, place.run(family, "--cache_latents_to_disk", **data))
    made = place.times()
    assert len(made) == 10
    assert_same(plain, place.run(family, "--cache_latents_to_disk", **data))
    assert_same(plain, place.run(family, "--cache_latents_to_disk", "--skip_cache_check", **data))
    assert_same(plain, place.run(family, "--cache_latents_to_disk", "--verify_caches", **data))
    assert place.times() == made


def test_compact_files_are_close_and_half_as_large(place):
    plain = place.run("flux")
    close = place.run("flux", "--cache_latents_to_disk", "--cache_format", "safetensors")
    assert plain[0].losses == pytest.approx(close[0].losses, rel=0.02)
    files = place.times("*_flux.safetensors")
    assert len(files) == 10 and not place.times()
    assert_same(close, place.run("flux", "--cache_latents_to_disk"))  # found though npz would be written
    assert not place.times()


def test_texts_on_disk_or_in_memory_are_the_same(place):
    data = {"subset": "shuffle_caption = true\ncaption_dropout_rate = 0.3\n"}
    memory = place.run("flux", "--network_train_unet_only", "--cache_text_encoder_outputs", *VARIANTS, **data)
    assert not place.times()
    disk = place.run("flux", *TEXT, *VARIANTS, **data)
    assert_same(memory, disk)
    made = place.times("*_te.npz") | place.times(".*_te.npz")
    assert len(made) == 11 and ".empty_caption_flux_te.npz" in made
    assert_same(disk, place.run("flux", *TEXT, *VARIANTS, **data))
    assert place.times("*_te.npz") | place.times(".*_te.npz") == made
    # four variants contain the three: files are completed, and other captions are drawn
    more = place.run("flux", *TEXT, "--cache_caption_variants", "4", **data)
    assert more[0].losses != disk[0].losses


def test_captions_of_a_cached_run_are_those_that_were_cached(place):
    record = place.folder / "record"
    subset = "shuffle_caption = true\ncaption_dropout_rate = 0.3\ncaption_prefix = 'photo,'\nkeep_tokens = 1\n"
    more = ("--max_train_epochs", "12", "--record_steps", str(record))
    place.run("flux", *TEXT, *VARIANTS, *more, subset=subset, batch_size=4)
    seen = {}
    for line in map(json.loads, (record / "steps.jsonl").read_text().splitlines()):
        for key, caption in zip(line["image_keys"], line["captions"]):
            seen.setdefault(key, set()).add(caption)
    assert all(len(captions - {""}) <= 3 for captions in seen.values())
    assert sum(len(captions - {""}) > 1 for captions in seen.values()) > 5
    assert sum("" in captions for captions in seen.values()) > 5
    texts = {caption for captions in seen.values() for caption in captions if caption}
    assert all(text.startswith("photo,") for text in texts)


def test_only_what_changed_is_made_again(place, messages):
    arguments = ("--cache_latents_to_disk", *TEXT)
    place.run("flux", *arguments)
    before = place.times()
    (place.images / "cat.txt").write_text("another caption")
    with Image.open(place.images / "coins.png") as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(place.images / "coins.png")
    latents = next(place.images.glob("flower_*_flux.npz"))
    latents.write_bytes(latents.read_bytes()[:500])
    os.utime(place.images / "grass.png", ns=(1, 1))  # copied, not changed
    place.run("flux", *arguments)
    after = place.times()
    coins = next(place.images.glob("coins_*_flux.npz"))
    assert {name for name in after if after[name] != before[name]} == {"cat_flux_te.npz", coins.name, latents.name}
    assert f"{latents} is damaged and will be made again" in messages.text
    assert not list(place.images.glob(".*.tmp"))


def test_another_autoencoder_or_interpolation_makes_latents_again(place):
    place.run("sd", "--cache_latents_to_disk")
    before = place.times()
    place.run("sd", "--cache_latents_to_disk", subset="resize_interpolation = 'nearest'")
    middle = place.times()
    assert all(middle[name] != before[name] for name in before)
    model = place.folder / "other.safetensors"
    tensors = load_file(place.inputs.model("sd15"))
    name = "first_stage_model.encoder.conv_in.weight"
    save_file_atomic({**tensors, name: tensors[name] * 1.01}, model)
    place.run(
        "sd",
        "--cache_latents_to_disk",
        "--pretrained_model_name_or_path",
        str(model),
        subset="resize_interpolation = 'nearest'",
    )
    assert all(place.times()[name] != middle[name] for name in middle)


def test_another_text_encoder_or_token_length_makes_texts_again(place):
    place.run("flux", *TEXT)
    before = place.times()
    place.run("flux", *TEXT, "--t5xxl_max_token_length", "40")
    middle = place.times()
    assert all(middle[name] != before[name] for name in before)
    tensors = load_file(place.inputs.model("clip_l"))
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file_atomic({**tensors, name: tensors[name] * 1.01}, place.folder / "clip.safetensors")
    more = ("--t5xxl_max_token_length", "40", "--clip_l", str(place.folder / "clip.safetensors"))
    place.run("flux", *TEXT, *more)
    assert all(place.times()[name] != middle[name] for name in middle)


def test_two_sizes_of_one_folder_share_files(place):
    """The reference trains the second dataset of an SD run on the latents of the first."""
    toml = dataset_toml(place.folder, place)
    toml.write_text(toml.read_text() + toml.read_text().replace("resolution = 128", "resolution = 64"))
    arguments = network_arguments("sd", place.inputs, place.folder, toml, "--cache_latents_to_disk")
    first = run_training("sd", arguments)
    assert first.losses == run_training("sd", [a for a in arguments if a != "--cache_latents_to_disk"]).losses
    with np.load(next(place.images.glob("astronaut_*.npz"))) as arrays:
        assert {"latents_16x16", "latents_8x8"} <= set(arrays.files)


def test_caches_of_the_reference_are_trained_on(place):
    """Its posterior samples, not our mode: the files are taken, and nothing is encoded."""
    for path in (ROOT / "tests" / "golden" / "caches" / "sd15_lora_b2_cache_disk").glob("*.npz"):
        shutil.copyfile(path, place.images / path.name.removeprefix("img__"))
    before = place.times()
    record = place.folder / "record"
    place.run("sd", "--cache_latents_to_disk", "--record_steps", str(record))
    assert place.times() == before
    line = json.loads((record / "steps.jsonl").read_text().splitlines()[0])
    tensors = load_file(record / "step_000000.safetensors")
    stem = Path(line["image_keys"][0]).stem
    with np.load(next(place.images.glob(f"{stem}_*.npz"))) as arrays:
        expected = torch.from_numpy(arrays["latents"]) * 0.18215
    assert torch.equal(tensors["latents"][0], expected)


def test_a_complete_cache_needs_no_encoder(place):
    """Neither their libraries nor their weights are touched: damaged files do not matter."""
    place.run("flux", "--cache_latents_to_disk", *TEXT)
    toml = dataset_toml(place.folder, place, batch_size=2)
    arguments = network_arguments("flux", place.inputs, place.folder, toml, "--cache_latents_to_disk", *TEXT)
    code = (
        "import sys; sys.argv = ['flux_train_network.py', *sys.argv[1:]]\n"
        "from library.train_util import main\n"
        "main('flux', 'network')\n"
        "print([name for name in ('transformers', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[]")
    assert "caches of latents: 10 ready" in done.stderr


def test_trained_clip_beside_cached_t5(place):
    more = ("--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk")
    plain = place.run("flux", batch_size=1)
    cached = place.run("flux", *more, batch_size=1)
    assert plain[0].losses == pytest.approx(cached[0].losses, rel=1e-6)
    assert any("lora_te1_" in name and tensor.abs().sum() > 0 for name, tensor in cached[1].items() if "up" in name)


def test_sample_prompts_beside_complete_caches(place):
    prompts = place.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    more = ("--cache_latents_to_disk", *TEXT, "--sample_prompts", str(prompts), "--sample_every_n_steps", "4")
    place.run("flux", "--cache_latents_to_disk", *TEXT)
    place.run("flux", *more)
    assert list((place.folder / "out" / "sample").glob("*.png"))


def test_families_without_text_files_say_so(place):
    toml = dataset_toml(place.folder, place)
    options = parse_options("sd", "network", network_arguments("sd", place.inputs, place.folder, toml))
    with pytest.raises(UserError, match="no program keeps such files for"):
        cache("sd", options, texts=True)


@pytest.mark.parametrize("key", ["color_aug = true", "random_crop = true", "face_crop_aug_range = [1, 3]"])
def test_latents_of_changing_images_are_not_cached(place, key):
    with pytest.raises(UserError, match="cached latents"):
        place.run("sd", "--cache_latents", subset=key)
    place.run("sd", subset=key)


def test_an_image_that_is_gone_trains_from_its_cache(place):
    place.run("flux", "--cache_latents_to_disk")
    metadata = place.folder / "m.jsonl"
    lines = [
        {"image_path": name, "caption": f"a {name}", "image_size": size}
        for name, size in (("cat.png", [176, 132]), ("grass.png", [64, 100]))
    ]
    metadata.write_text("\n".join(map(json.dumps, lines)))
    (place.images / "grass.png").unlink()
    toml = dataset_toml(place.folder, place, subset=f"  metadata_file = '{metadata}'")
    arguments = network_arguments("flux", place.inputs, place.folder, toml, "--cache_latents_to_disk")
    assert len(run_training("flux", arguments).losses) == 4
    with pytest.raises(UserError, match="--cache_latents_to_disk"):
        run_training("flux", arguments[:-1])


def mask_run(place, *more, subset="  alpha_mask = true\n"):
    toml = dataset_toml(place.folder, place, subset=subset)
    toml.write_text(toml.read_text().replace("/data/img", "/data/alpha"))
    record = place.folder / "record"
    shutil.rmtree(record, ignore_errors=True)
    arguments = network_arguments("sd", place.inputs, place.folder, toml, *more, "--record_steps", str(record))
    return run_training("sd", arguments).losses


def test_masks_act_alike_from_alpha_and_from_files_cached_or_not(place):
    """`data/mask` holds the alpha channels of `data/alpha` as grey pictures."""
    plain = mask_run(place, subset="")
    alpha = mask_run(place)
    assert all(masked < whole for masked, whole in zip(alpha, plain))
    assert mask_run(place, "--cache_latents") == alpha
    assert mask_run(place, "--cache_latents_to_disk") == alpha
    control = f"  conditioning_data_dir = '{place.folder / 'data' / 'mask'}'\n"
    files = mask_run(place, "--masked_loss", subset=control)
    assert files == pytest.approx(alpha, rel=1e-6)
    assert mask_run(place, "--masked_loss", "--cache_latents", subset=control) == files
    assert mask_run(place, "--masked_loss", "--cache_latents_to_disk", subset=control) == files
    flipped = mask_run(place, "--cache_latents_to_disk", subset="  alpha_mask = true\n  flip_aug = true\n")
    assert flipped == mask_run(place, subset="  alpha_mask = true\n  flip_aug = true\n")
    assert flipped == mask_run(place, "--cache_latents", subset="  alpha_mask = true\n  flip_aug = true\n")
    # switched off again, the stored mask is left alone (the reference goes on applying it)
    assert mask_run(place, "--cache_latents_to_disk", subset="") == plain


def test_control_images_need_a_use(place):
    with pytest.raises(UserError, match="has an effect only with --masked_loss"):
        mask_run(place, subset=f"  conditioning_data_dir = '{place.folder / 'data' / 'mask'}'\n")


@pytest.mark.golden
def test_the_first_masked_loss_is_the_references(inputs, tmp_path):
    """The record was made with --min_snr_gamma 5, a factor of each loss that follows from its timestep."""
    from library.diffusion.ddpm import alphas_cumprod

    case = Case("sd15_lora_mask")
    _, arguments = case.script_and_arguments(inputs, tmp_path)
    at = arguments.index("--min_snr_gamma")
    run_training("sd", [*arguments[:at], *arguments[at + 2 :], "--max_train_steps", "1"])
    theirs = case.lines()[0]
    ours = json.loads((tmp_path / "steps" / "steps.jsonl").read_text().splitlines()[0])
    signal = alphas_cumprod()[int(theirs["timesteps"][0])]
    snr = float(signal / (1 - signal))
    assert ours["loss"] * min(snr, 5) / snr == pytest.approx(theirs["loss"], rel=1e-5)


def test_prior_and_subset_weights_scale_the_loss(place):
    plain = place.run("sd", "--max_train_steps", "1", batch_size=1)[0].losses[0]
    halved = place.run("sd", "--max_train_steps", "1", batch_size=1, subset="  loss_weight = 0.5\n")[0].losses[0]
    assert halved == pytest.approx(plain / 2, rel=1e-6)


def test_preserved_images_are_trained_to_stay(place):
    """With a network that does nothing yet, their loss is zero."""
    subset = "  custom_attributes = { diff_output_preservation = true }\n"
    assert place.run("sd", "--max_train_steps", "1", subset=subset)[0].losses == (0.0,)
    assert place.run("flux", subset=subset)[0].losses[0] == 0.0
    assert place.run("flux")[0].losses[0] > 0.1


def test_a_subset_shifts_its_noise_levels(place):
    def levels(offset, *more):
        record = place.folder / "record"
        shutil.rmtree(record, ignore_errors=True)
        subset = f"  custom_attributes = {{ timestep_sampling = {{ offset = {offset} }} }}\n"
        arguments = ("--timestep_sampling", "shift", "--record_steps", str(record), *more)
        place.run("flux", *arguments, subset=subset if offset else "")
        lines = (record / "steps.jsonl").read_text().splitlines()
        return torch.tensor([t / 1000 for line in map(json.loads, lines) for t in line["timesteps"]])

    plain, moved = levels(0), levels(1.5)
    assert torch.allclose(torch.logit(moved), torch.logit(plain) + 1.5, atol=1e-3)
    with pytest.raises(UserError, match="has an effect only in flow models with"):
        levels(1.5, "--timestep_sampling", "uniform")


def tool(name, *arguments, processes=1):
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    if processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(processes), "--multi_gpu"]
        command = [sys.executable, *launch, str(ROOT / "tools" / name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_the_tools_fill_what_a_run_then_finds(place):
    toml = dataset_toml(place.folder, place, subset=VARIED)
    base = [*place.inputs.base("flux"), "--dataset_config", str(toml), "--flux"]
    for name, more in (("cache_latents.py", []), ("cache_text_encoder_outputs.py", VARIANTS)):
        process = tool(name, *base, *more)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-2000:]
        assert "10 of them new" in said or "11 of them new" in said
    made = place.times() | place.times(".*.npz")
    assert len(made) == 21
    place.run("flux", "--cache_latents_to_disk", *TEXT, *VARIANTS, subset=VARIED)
    assert place.times() | place.times(".*.npz") == made


def test_the_tools_answer_mistakes(place):
    process = tool("cache_latents.py", "--family", "fluxx")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "did you mean 'flux'" in said
    process = tool("cache_latents.py", "--flux", "--dataset_config", str(place.folder / "none.toml"))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--pretrained_model_name_or_path: is required" in said and "Traceback" not in said
    process = tool("cache_text_encoder_outputs.py", "--sdxl")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "--pretrained_model_name_or_path: is required" in said


@pytest.mark.dist
def test_two_processes_share_the_work(place):
    """Two sizes in one file: each file is written by one process, and no entry is lost."""
    toml = dataset_toml(place.folder, place, subset="  flip_aug = true")
    toml.write_text(toml.read_text() + toml.read_text().replace("resolution = 128", "resolution = 64"))
    process = tool("cache_latents.py", *place.inputs.base("sd"), "--dataset_config", str(toml), processes=2)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert "caches complete: 20 of latents, 0 of texts, 20 of them new" in said
    files = list(place.images.glob("*_sd.npz"))
    assert len(files) == 10
    for file in files:
        with np.load(file) as arrays:
            assert len([name for name in arrays.files if name.startswith("latents_flipped_")]) == 2


@pytest.mark.slow
def test_killed_ten_times_then_a_clean_finish(place):
    """No file is ever damaged, and only what was in flight is made twice."""
    images = place.folder / "data" / "img"
    for number in range(40):
        for name in ("coffee.jpg", "motorcycle.jpg", "temple.jpg"):
            copy = images / f"{number:02d}_{name}"
            shutil.copyfile(images / name, copy)
            with open(copy, "ab") as file:
                file.write(bytes([number]))  # so that contents differ
            copy.with_suffix(".txt").write_text("x")
    total = len([path for path in images.iterdir() if path.suffix in (".jpg", ".png", ".webp")])
    toml = dataset_toml(place.folder, place)
    arguments = [*place.inputs.base("sd"), "--dataset_config", str(toml)]
    seen = {}
    for _ in range(10):
        process = tool("cache_latents.py", *arguments)
        count = len(place.times())
        deadline = time.monotonic() + 60
        while len(place.times()) < count + 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name, when in place.times().items():
            with np.load(images / name) as arrays:  # complete and readable, whenever the process died
                assert all(arrays[key] is not None for key in arrays.files)
            assert seen.setdefault(name, when) == when  # never made again
    assert 20 < len(seen) < total
    process = tool("cache_latents.py", *arguments)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-2000:]
    assert f"{len(seen)} ready" in said and f"{total - len(seen)} of them new" in said
    assert all(place.times()[name] == when for name, when in seen.items())
    assert len(place.times()) == total
    assert not list(images.glob(".*.tmp"))
