"""Images without training: equal to the samples of a training, every flag, mistakes."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import FeatureNotAvailable, UserError
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.inference import main, make_images, make_inference_parser, parse_inference
from library.modules.quantize import is_fp8
from library.train_util import load_family
from library.training import inference_run

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a cat on a sofa"
PROMPT_LINE = f"{PROMPT} --w 96 --h 64 --d 7 --s 3 --g 2.5 --l 2 --n blurry\n"
SAME = ("--prompt", PROMPT, "--width", "96", "--height", "64", "--seed", "7", "--steps", "3", "--guidance", "2.5")
SAME += ("--cfg_scale", "2", "--negative_prompt", "blurry", "--dtype", "float32")


def base(inputs):
    """Flags that name the model's files."""
    flags = {"--ckpt_path": "flux1_dev", "--clip_l": "clip_l", "--t5xxl": "t5xxl", "--ae": "ae"}
    named = [part for flag, name in flags.items() for part in (flag, inputs.model(name))]
    return [*named, "--t5xxl_max_token_length", "32", "--tokenizer_cache_dir", str(inputs.folder / "tokenizers")]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Sample and adapter of a short training, by the flags that it was given; each made once."""
    made = {}

    def train(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("trained")
            (folder / "p.txt").write_text(PROMPT_LINE)
            more = ("--sample_prompts", str(folder / "p.txt"), "--sample_every_n_steps", "2")
            arguments = network_arguments("flux", inputs, folder, dataset_toml(folder, inputs), *more, *flags)
            run_training("flux", [*arguments, "--max_train_steps", "2", "--learning_rate", "1e-1"])
            (sample,) = (folder / "out" / "sample").glob("*.png")
            made[flags] = sample, folder / "out" / "last.safetensors"
        return made[flags]

    return train


@pytest.fixture
def pixels(inputs, tmp_path):
    """The image of some flags; flags given twice count as the last time."""

    def make(*flags):
        options = parse_inference("flux", [*base(inputs), *SAME, "--output_dir", str(tmp_path / "out"), *flags])
        (path,) = make_images("flux", options)
        with Image.open(path) as image:
            return image.size, image.tobytes()

    return make


def of(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--network_train_unet_only", "--cache_text_encoder_outputs"),
        ("--network_args", "in_dims=4,4,4,4,4", "train_t5xxl=True"),
    ],
    ids=["with text encoders", "denoiser", "T5 and inputs"],
)
def test_the_image_is_the_sample_of_the_training(trained, pixels, flags):
    """Bit for bit: same prompt, seed, size, steps, guidance, adapter file."""
    sample, adapter = trained(*flags)
    assert pixels("--lora_weights", str(adapter)) == of(sample)
    assert pixels() != of(sample)


def test_in_bfloat16_too(trained, pixels):
    sample, adapter = trained("--mixed_precision", "bf16")
    assert pixels("--lora_weights", f"{adapter};1", "--dtype", "bf16") == of(sample)


def test_lycoris_files_are_read_by_their_own_module(trained, pixels):
    sample, adapter = trained("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp")
    assert pixels("--lora_weights", str(adapter)) == of(sample)


def apart(one, other):
    (size, first), (other_size, second) = one, other
    assert size == other_size
    first, second = (torch.frombuffer(bytearray(data), dtype=torch.uint8).float() for data in (first, second))
    return float((first - second).abs().mean())


def test_merged_adapters_make_nearly_the_same_image(trained, pixels):
    _, adapter = trained()
    applied, plain = pixels("--lora_weights", f"{adapter};0.5"), pixels()
    merged = pixels("--lora_weights", f"{adapter};0.5", "--merge_lora_weights")
    assert apart(applied, merged) < 0.01 * apart(applied, plain)


def test_several_adapters_add_up(trained, pixels):
    _, adapter = trained()
    both = pixels("--lora_weights", f"{adapter};0.25", f"{adapter};0.75")
    one, plain = pixels("--lora_weights", str(adapter)), pixels()
    assert apart(both, one) < 0.01 * apart(one, plain)


# flag -> what is given, beside what
ROWS = {
    "ckpt_path": (("--ckpt_path", "{other}"), ()),
    "clip_l": (("--clip_l", "{other_clip}"), ()),
    "t5xxl": (("--t5xxl", "{other_t5}"), ()),
    "ae": (("--ae", "{other_ae}"), ()),
    "apply_t5_attn_mask": (("--apply_t5_attn_mask",), ()),
    "t5xxl_max_token_length": (("--t5xxl_max_token_length", "48"), ()),
    "guidance": (("--guidance", "1"), ()),
    "flux_dtype": (("--flux_dtype", "fp8"), ()),
    "clip_l_dtype": (("--clip_l_dtype", "bf16"), ()),
    "t5xxl_dtype": (("--t5xxl_dtype", "fp8_e4m3fn"), ()),
    "ae_dtype": (("--ae_dtype", "bfloat16"), ()),
    "dtype": (("--dtype", "bfloat16"), ()),
    "prompt": (("--prompt", "a dog"), ()),
    "negative_prompt": (("--negative_prompt", "a dog"), ()),
    "width": (("--width", "64"), ()),
    "height": (("--height", "96"), ()),
    "steps": (("--steps", "2"), ()),
    "cfg_scale": (("--cfg_scale", "4"), ()),
    "seed": (("--seed", "8"), ()),
    "lora_weights": (("--lora_weights", "{adapter}"), ()),
    "merge_lora_weights": (
        ("--lora_weights", "{adapter}", "--merge_lora_weights"),
        ("--lora_weights", "{adapter}"),
    ),
}
# shown by tests of their own
ELSEWHERE = {"output_dir", "interactive", "tokenizer_cache_dir", "offload", "model_type"}


@pytest.fixture(scope="module")
def places(inputs, trained, tmp_path_factory):
    """Files with other weights, and an adapter."""
    folder = tmp_path_factory.mktemp("other")
    found = {"adapter": str(trained()[1])}
    for key, name in {"other": "flux1_dev", "other_clip": "clip_l", "other_t5": "t5xxl", "other_ae": "ae"}.items():
        changed = {name: tensor * 1.2 for name, tensor in load_file(inputs.model(name)).items()}
        found[key] = str(folder / f"{key}.safetensors")
        save_file_atomic(changed, found[key], TensorFile(inputs.model(name)).metadata)
    return found


def test_every_flag_has_a_row():
    flags = {action.dest for action in make_inference_parser("flux")._actions if action.dest != "help"}
    assert flags == set(ROWS) | ELSEWHERE


@pytest.mark.parametrize("name", ROWS)
def test_a_flag_changes_the_image(name, pixels, places):
    given, beside = ([part.format(**places) for part in flags] for flags in ROWS[name])
    assert pixels(*given) != pixels(*beside)


def test_every_flag_of_the_reference():
    """Names, types, defaults of kohya-ss/sd-scripts 0.10.1."""
    expected = {
        **dict.fromkeys(("ckpt_path", "clip_l", "t5xxl", "ae", "negative_prompt", "seed", "steps")),
        **dict.fromkeys(("clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype")),
        **dict.fromkeys(("apply_t5_attn_mask", "offload", "merge_lora_weights", "interactive"), False),
        "model_type": "flux",
        "prompt": "A photo of a cat",
        "output_dir": ".",
        "dtype": "bfloat16",
        "guidance": 3.5,
        "cfg_scale": 1.0,
        "width": 1360,
        "height": 768,
        "lora_weights": [],
    }
    actions = {action.dest: action for action in make_inference_parser("flux")._actions}
    assert {name: actions[name].default for name in expected} == expected
    assert set(actions) - set(expected) == {"help", "tokenizer_cache_dir", "t5xxl_max_token_length"}
    assert actions["lora_weights"].nargs == "*" and actions["model_type"].choices == ("flux", "chroma")


def loaded_with(inputs, monkeypatch, tmp_path, *flags):
    """What was loaded, and the image's request, without making it."""
    seen = {}
    real = inference_run._load
    monkeypatch.setattr(
        inference_run, "_load", lambda *given: seen.setdefault("studio", real(*given)) or seen["studio"]
    )
    monkeypatch.setattr(inference_run, "_write", lambda studio, request, folder: seen.setdefault("request", request))
    make_images("flux", parse_inference("flux", [*base(inputs), "--output_dir", str(tmp_path), *flags]))
    return seen["studio"], seen["request"]


@pytest.mark.parametrize(("more", "merged"), [((), False), (("--merge_lora_weights",), True)])
def test_8_bit_weights_are_kept_in_8_bits(inputs, trained, monkeypatch, tmp_path, more, merged):
    """Merged adapters are added before the weights become narrow."""
    flags = ("--flux_dtype", "fp8", "--lora_weights", str(trained()[1]), *more)
    studio, _ = loaded_with(inputs, monkeypatch, tmp_path, *flags)
    layer = studio.model.denoiser.double_blocks[0].img_attn.qkv
    assert is_fp8(layer) and layer.weight.dtype == torch.float8_e4m3fn
    assert bool(studio.networks) != merged


def test_8_bit_weights_change_the_image_a_little(trained, pixels):
    adapter = str(trained()[1])
    plain, other = pixels("--lora_weights", adapter), pixels("--seed", "9")
    assert apart(plain, pixels("--lora_weights", adapter, "--flux_dtype", "fp8")) < 0.2 * apart(plain, other)
    merged = pixels("--lora_weights", adapter, "--flux_dtype", "fp8", "--merge_lora_weights")
    assert apart(plain, merged) < 0.2 * apart(plain, other)


def test_steps_and_noise_levels_follow_the_variant(inputs, monkeypatch, tmp_path):
    """dev: 50 steps, levels shifted by size; schnell: 4 steps, unshifted, no guidance."""
    _, dev = loaded_with(inputs, monkeypatch, tmp_path)
    assert (dev.steps, dev.flow_shift, dev.width, dev.height, dev.guidance) == (50, None, 1360, 768, 3.5)
    tensors = load_file(inputs.model("flux1_dev"))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("guidance_in.")}
    file = tmp_path / "schnell.safetensors"
    metadata = {key: text for key, text in TensorFile(inputs.model("flux1_dev")).metadata.items() if key != "config"}
    save_file_atomic(kept, file, metadata)
    monkeypatch.undo()
    _, schnell = loaded_with(inputs, monkeypatch, tmp_path, "--ckpt_path", str(file))
    assert (schnell.steps, schnell.flow_shift, schnell.guidance) == (4, 1.0, None)
    monkeypatch.undo()
    _, asked = loaded_with(inputs, monkeypatch, tmp_path, "--ckpt_path", str(file), "--steps", "6")
    assert (asked.steps, asked.flow_shift) == (6, 1.0)


def test_offloading_lends_parts_and_changes_nothing(inputs, trained, pixels, monkeypatch, tmp_path, messages):
    adapter = str(trained()[1])
    assert pixels("--lora_weights", adapter, "--offload") == pixels("--lora_weights", adapter)
    assert "--offload has no effect" in messages.text
    moves = []

    class Part(torch.nn.Module):
        def to(self, place):
            moves.append(str(place))
            return self

    with inference_run._lent([Part(), None], torch.device("meta"), torch.device("cpu")):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    with inference_run._lent([Part()], torch.device("cpu"), torch.device("cpu")):
        assert len(moves) == 2


def answers(inputs, monkeypatch, tmp_path, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    options = [*base(inputs), *SAME, "--cfg_scale", "1", "--negative_prompt", "", "--output_dir", str(tmp_path / "o")]
    paths = make_images("flux", parse_inference("flux", [*options, "--interactive", *flags]))
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append((json.loads(image.text["sample_request"]), image.tobytes()))
    return found


def test_interactive_lines(inputs, monkeypatch, tmp_path, messages):
    lines = "a cat\na dog --w 64 --h 64 --s 2 --d 5 --g 1 --l 2 --n blurry\na cup --c 3\na cat --w wide\na cat\n\nno\n"
    first, second, third, fourth = answers(inputs, monkeypatch, tmp_path, lines)
    assert (
        second[0]
        | {
            "prompt": "a dog",
            "width": 64,
            "height": 64,
            "steps": 2,
            "seed": 5,
            "guidance": 1.0,
            "scale": 2.0,
            "negative": "blurry",
        }
        == second[0]
    )
    assert third[0]["scale"] == 3.0
    # the flags hold where a line says nothing: the same image again
    assert first == fourth
    assert "error: --w wide: expected a whole number" in messages.text


def test_lines_end_with_the_input(inputs, monkeypatch, tmp_path):
    assert len(answers(inputs, monkeypatch, tmp_path, "a cat --s 1")) == 1


def test_strengths_of_adapters_by_line(inputs, trained, monkeypatch, tmp_path, messages):
    """--m counts for its line, then the file's own strength again; a wrong count is answered."""
    half = ("--lora_weights", f"{trained()[1]};0.5")
    lines = "a cat\na cat --m 0.5\na cat --m 1\na cat --m 0\na cat\na cat --m 1,2\na cat --m x\n"
    made = [image for _, image in answers(inputs, monkeypatch, tmp_path, lines, *half)]
    own, given, full, none, again = made
    ((_, plain),) = answers(inputs, monkeypatch, tmp_path, "a cat\n")
    assert own == given == again != full != none == plain
    assert "expected one number for each file" in messages.text and "--m x: expected numbers" in messages.text
    assert answers(inputs, monkeypatch, tmp_path, "a cat --m 1\n", *half, "--merge_lora_weights") == []
    assert "--m: there is no adapter that is not merged" in messages.text


def test_images_of_one_second_do_not_replace_each_other(inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(inference_run, "time_stamp", lambda: "20250101000000")
    answers(inputs, monkeypatch, tmp_path, "a cat --s 1\n" * 3)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "20250101000000_7.png",
        "20250101000000_7_2.png",
        "20250101000000_7_3.png",
    ]


def test_without_a_seed_every_image_is_another(inputs, tmp_path):
    def image():
        given = [*base(inputs), "--width", "64", "--height", "64", "--steps", "1", "--output_dir", str(tmp_path)]
        (path,) = make_images("flux", parse_inference("flux", given))
        return path.stem.split("_")[1], of(path)

    (one, first), (other, second) = image(), image()
    assert one != other and first != second


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--model_type", "chroma", "--apply_t5_attn_mask", "--guidance", "0"), "is a FLUX.1 checkpoint; leave"),
        (("--model_type", "chroma", "--apply_t5_attn_mask"), "Chroma was trained with guidance 0; give --guidance 0"),
        (("--model_type", "chroma", "--guidance", "0"), "Chroma needs --apply_t5_attn_mask"),
        (("--ckpt_path", "nowhere.safetensors"), "--ckpt_path = 'nowhere.safetensors': no such file"),
        (("--ae", "{clip}"), "--ae"),
        (("--lora_weights", "none.safetensors"), "--lora_weights = 'none.safetensors': no such file"),
        (("--lora_weights", "a;strong"), "expected a file, or 'file;strength'"),
        (("--lora_weights", "{clip}"), "is not an adapter file of this model"),
        (("--dtype", "fp16"), "the CPU cannot compute in fp16"),
        (("--dtype", "fp8"), "only weights of denoiser and text encoders"),
        (("--ae_dtype", "fp8"), "only weights of denoiser and text encoders"),
        (("--flux_dtype", "fp9"), "--flux_dtype = 'fp9': expected one of"),
        (("--width", "0"), "--width = 0: must be at least 1"),
        (("--steps", "-1"), "--steps = -1: must be at least 1"),
        (("--seed", "-1"), "--seed = -1: must be at least 0"),
        (("--output_dir", "{clip}/x"), "--output_dir"),
        (("--promt", "x"), "--promt: unknown flag; did you mean --prompt?"),
    ],
)
def test_mistakes_are_one_line(inputs, capsys, tmp_path, flags, text):
    given = [part.format(clip=inputs.model("clip_l")) for part in flags]
    with pytest.raises(SystemExit) as ended:
        main("flux", [*base(inputs), "--output_dir", str(tmp_path), *given])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(said) == 1 and text in said[0]


def test_missing_files_are_named_together(inputs):
    with pytest.raises(UserError) as error:
        make_images("flux", parse_inference("flux", ["--ckpt_path", inputs.model("flux1_dev")]))
    assert [problem.where for problem in error.value.problems] == ["--clip_l", "--t5xxl", "--ae"]
    with pytest.raises(UserError, match="--ckpt_path: is required"):
        parse_inference("flux", [])


def test_families_without_images():
    without = replace(load_family("flux"), inference=None)
    for ask in (make_inference_parser, lambda family: parse_inference(family, [])):
        with pytest.raises(FeatureNotAvailable, match="images of it cannot be made in this version"):
            ask(without)


def test_flags_without_effect_are_said(inputs, monkeypatch, tmp_path, messages):
    loaded_with(inputs, monkeypatch, tmp_path, "--negative_prompt", "blurry", "--width", "100")
    assert "no effect: --n (negative_prompt)" in messages.text
    assert "100x768 becomes 96x768" in messages.text


@pytest.mark.e2e
def test_the_script(inputs, trained, tmp_path):
    """A launch of its own writes the sample of the training."""
    sample, adapter = trained()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "flux_minimal_inference.py", *base(inputs), *SAME, "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--lora_weights", f"{adapter};1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    assert of(path) == of(sample)
    with Image.open(path) as image:
        assert image.text["parameters"].startswith(f"{PROMPT}\nNegative prompt: blurry\nSteps: 3, Sampler: Euler")
