"""Images of SDXL, Stable Diffusion 3 and Chroma without training: the samples of a training, flags, mistakes."""

import pytest
import torch
from PIL import Image
from support.runs import FAMILY, dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.inference import main, make_images, make_inference_parser, parse_inference
from library.train_util import load_family
from library.training import inference_run

PROMPT = "a cat on a sofa"
LINE = f"{PROMPT} --w 96 --h 64 --d 7 --s 3 --l 2 --n blurry"
SAME = ("--prompt", PROMPT, "--width", "96", "--height", "64", "--seed", "7", "--steps", "3", "--cfg_scale", "2")
SAME += ("--negative_prompt", "blurry", "--dtype", "float32")
SHORT_T5 = ("--t5xxl_max_token_length", "32")
# model -> its files, other flags of the script, what the prompt of the training says more
MODELS = {
    "sdxl": ({"--ckpt_path": "sdxl"}, ("--sampler", "euler"), " --ss euler"),
    "sd3": (
        {"--ckpt_path": "sd3_medium", "--clip_l": "clip_l", "--clip_g": "clip_g", "--t5xxl": "t5xxl"},
        ("--t5xxl_token_length", "32", "--flow_shift", "2"),
        " --fs 2",
    ),
    "chroma": (
        {"--ckpt_path": "chroma", "--t5xxl": "t5xxl", "--ae": "ae"},
        ("--model_type", "chroma", "--apply_t5_attn_mask", "--guidance", "0", *SHORT_T5),
        "",
    ),
}


def family_of(name):
    return FAMILY.get(name, name)


def base(name, inputs):
    """Flags that name the model's files, and what its tiny model needs."""
    files, more, _ = MODELS[name]
    named = [part for flag, model in files.items() for part in (flag, inputs.model(model))]
    return [*named, *more, "--tokenizer_cache_dir", str(inputs.folder / "tokenizers")]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Model and flags of a short training -> its sample and adapter; each made once."""
    made = {}

    def train(name, *flags):
        if (name, flags) not in made:
            folder = tmp_path_factory.mktemp(name)
            (folder / "p.txt").write_text(LINE + MODELS[name][2] + "\n")
            more = ("--sample_prompts", str(folder / "p.txt"), "--sample_every_n_steps", "2", *flags)
            arguments = network_arguments(name, inputs, folder, dataset_toml(folder, inputs), *more)
            run_training(name, [*arguments, "--max_train_steps", "2", "--learning_rate", "1e-1"])
            (sample,) = (folder / "out" / "sample").glob("*.png")
            made[name, flags] = sample, folder / "out" / "last.safetensors"
        return made[name, flags]

    return train


@pytest.fixture
def pixels(inputs, tmp_path):
    """The image of a model and some flags; flags given twice count as the last time."""

    def make(name, *flags):
        given = [*base(name, inputs), *SAME, "--output_dir", str(tmp_path / "out"), *flags]
        (path,) = make_images(family_of(name), parse_inference(family_of(name), given))
        return of(path)

    return make


def of(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_image_is_the_sample_of_the_training(trained, pixels, name):
    """Bit for bit; with text encoders in the adapter where they can be trained."""
    sample, adapter = trained(name)
    assert pixels(name, "--lora_weights", str(adapter)) == of(sample) != pixels(name)


@pytest.mark.parametrize(("name", "flags"), [("sd3", ("--bf16",)), ("chroma", ("--dtype", "bf16"))])
def test_in_bfloat16_too(trained, pixels, name, flags):
    sample, adapter = trained(name, "--mixed_precision", "bf16")
    assert pixels(name, "--lora_weights", str(adapter), *flags) == of(sample)


VELOCITY = ("--v_parameterization",)
# (model, flag) -> what is given, beside what
ROWS = {
    ("sdxl", "ckpt_path"): (("--ckpt_path", "{sdxl}"), ()),
    ("sdxl", "prompt2"): (("--prompt2", "a dog"), ()),
    ("sdxl", "vae"): (("--vae", "{sdxl}"), ()),
    ("sdxl", "sampler"): (("--sampler", "ddim"), ()),
    ("sdxl", "v_parameterization"): (VELOCITY, ()),
    ("sdxl", "zero_terminal_snr"): (
        ("--zero_terminal_snr", "--sampler", "ddim", *VELOCITY),
        ("--sampler", "ddim", *VELOCITY),
    ),
    ("sd3", "ckpt_path"): (("--ckpt_path", "{sd3_medium}"), ()),
    ("sd3", "clip_l"): (("--clip_l", "{clip_l}"), ()),
    ("sd3", "clip_g"): (("--clip_g", "{clip_g}"), ()),
    ("sd3", "t5xxl"): (("--t5xxl", "{t5xxl}"), ()),
    ("sd3", "vae"): (("--vae", "{sd3_medium}"), ()),
    ("sd3", "t5xxl_token_length"): (("--t5xxl_token_length", "48"), ()),
    ("sd3", "apply_lg_attn_mask"): (("--apply_lg_attn_mask",), ()),
    ("sd3", "apply_t5_attn_mask"): (("--apply_t5_attn_mask",), ()),
    ("sd3", "flow_shift"): (("--flow_shift", "5"), ()),
    ("sd3", "bf16"): (("--bf16",), ()),
    ("chroma", "ckpt_path"): (("--ckpt_path", "{chroma}"), ()),
    ("chroma", "t5xxl"): (("--t5xxl", "{t5xxl}"), ()),
    ("chroma", "cfg_scale"): (("--cfg_scale", "4"), ()),
    ("chroma", "flux_dtype"): (("--flux_dtype", "fp8"), ()),
    ("chroma", "t5xxl_dtype"): (("--t5xxl_dtype", "fp8"), ()),
}
REFUSED_HERE = {"fp16"}  # see test_mistakes_are_one_line


@pytest.fixture(scope="module")
def others(inputs, tmp_path_factory):
    """Files of the same models with other weights."""
    folder, found = tmp_path_factory.mktemp("other"), {}
    for name in ("sdxl", "sd3_medium", "chroma", "clip_l", "clip_g", "t5xxl"):
        changed = {key: tensor * 1.2 for key, tensor in load_file(inputs.model(name)).items()}
        found[name] = str(folder / f"{name}.safetensors")
        save_file_atomic(changed, found[name], TensorFile(inputs.model(name)).metadata)
    return found


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_every_flag_of_the_family_has_a_row(name):
    fields = {field for group in load_family(name).inference.option_groups for field in group.__dataclass_fields__}
    assert fields == {flag for model, flag in ROWS if model == name} | (REFUSED_HERE & fields)


@pytest.mark.parametrize(("name", "flag"), ROWS)
def test_a_flag_changes_the_image(pixels, others, name, flag):
    given, beside = ([part.format(**others) for part in flags] for flags in ROWS[name, flag])
    assert pixels(name, *given) != pixels(name, *beside)


def test_8_bits_and_offloading_without_the_first_encoder(trained, pixels):
    """Chroma has no CLIP: nothing is asked of what is not there."""
    adapter = ("--lora_weights", str(trained("chroma")[1]))
    assert pixels("chroma", *adapter, "--offload") == pixels("chroma", *adapter)
    assert pixels("chroma", *adapter, "--clip_l_dtype", "fp8") == pixels("chroma", *adapter)


# script -> names, defaults of kohya-ss/sd-scripts 0.10.1
REFERENCE = {
    "sdxl": {
        **dict.fromkeys(("ckpt_path", "prompt2")),
        "prompt": "A photo of a cat",
        "negative_prompt": "",
        "output_dir": ".",
        "lora_weights": [],
        "interactive": False,
    },
    "sd3": {
        **dict.fromkeys(("ckpt_path", "clip_l", "clip_g", "t5xxl")),
        **dict.fromkeys(("apply_lg_attn_mask", "apply_t5_attn_mask", "offload", "fp16", "bf16"), False),
        **dict.fromkeys(("merge_lora_weights", "interactive"), False),
        "t5xxl_token_length": 256,
        "prompt": "A photo of a cat",
        "negative_prompt": "",
        "cfg_scale": 5.0,
        "output_dir": ".",
        "seed": 1,
        "steps": 50,
        "lora_weights": [],
        "width": 1024,
        "height": 1024,
    },
}


@pytest.mark.parametrize("name", REFERENCE)
def test_every_flag_of_the_reference(name):
    actions = {action.dest: action for action in make_inference_parser(name)._actions}
    assert {flag: actions[flag].default for flag in REFERENCE[name]} == REFERENCE[name]
    assert actions["lora_weights"].nargs == "*"
    with pytest.raises(UserError, match="--ckpt_path: is required"):
        parse_inference(name, [])


def loaded_with(name, inputs, monkeypatch, tmp_path, *flags):
    """What was loaded, and the image's request, without making it."""
    seen = {}
    real = inference_run._load
    with monkeypatch.context() as patched:
        patched.setattr(inference_run, "_load", lambda *given: seen.setdefault("studio", real(*given)))
        patched.setattr(inference_run, "_write", lambda studio, request, folder: seen.setdefault("request", request))
        given = [*base(name, inputs), "--output_dir", str(tmp_path), *flags]
        make_images(family_of(name), parse_inference(family_of(name), given))
    return seen["studio"], seen["request"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sdxl", (1024, 1024, 50, 7.0, None, "euler")),
        ("sd3", (1024, 1024, 50, 5.0, 1, "euler")),
    ],
)
def test_defaults_of_images(inputs, monkeypatch, tmp_path, name, expected):
    _, request = loaded_with(name, inputs, monkeypatch, tmp_path)
    found = request.width, request.height, request.steps, request.scale, request.seed, request.sampler
    assert found == expected


def test_the_default_shift_is_that_of_samples(inputs, monkeypatch, tmp_path):
    _, request = loaded_with("sd3", inputs, monkeypatch, tmp_path, "--flow_shift", "3")
    given = [part for part in base("sd3", inputs) if part not in ("--flow_shift", "2")]
    assert parse_inference("sd3", given).value("flow_shift") == request.flow_shift == 3.0


def texts(studio, prompt, *, negative=False):
    with torch.no_grad():
        return studio.model.condition(prompt, negative=negative)


def test_the_second_encoder_reads_its_own_prompt(inputs, monkeypatch, tmp_path):
    """Of what the image shows; what it is not to show is read by both."""
    plain, _ = loaded_with("sdxl", inputs, monkeypatch, tmp_path, "--dtype", "float32")
    split, _ = loaded_with("sdxl", inputs, monkeypatch, tmp_path, "--dtype", "float32", "--prompt2", "a dog")
    first, second, found = texts(plain, "a cat"), texts(plain, "a dog"), texts(split, "a cat")
    assert torch.equal(found.hidden_state1, first.hidden_state1)
    assert torch.equal(found.hidden_state2, second.hidden_state2) and torch.equal(found.pool2, second.pool2)
    assert not torch.equal(found.hidden_state2, first.hidden_state2)
    unwanted, both = texts(split, "blurry", negative=True), texts(plain, "blurry", negative=True)
    assert all(torch.equal(getattr(unwanted, field), getattr(both, field)) for field in vars(both))


def test_prompts_of_different_length_lie_side_by_side(inputs, monkeypatch, tmp_path):
    """The shorter one is read in as many windows as the longer one; their start stays what it was."""
    long = "a dog " * 30
    split, _ = loaded_with("sdxl", inputs, monkeypatch, tmp_path, "--dtype", "float32", "--prompt2", long)
    found, alone = texts(split, "a cat"), texts(split, "a cat", negative=True)
    assert found.hidden_state1.shape[1] == found.hidden_state2.shape[1] == 2 * 75 + 2
    assert torch.allclose(found.hidden_state1[:, :76], alone.hidden_state1[:, :76], atol=1e-6)
    assert torch.equal(found.hidden_state2, texts(split, long, negative=True).hidden_state2)


def test_a_second_prompt_that_is_the_first_changes_nothing(pixels):
    assert pixels("sdxl", "--prompt2", PROMPT) == pixels("sdxl")
    assert pixels("sdxl", "--prompt2", "a dog " * 60)[0] == (96, 64)


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("sdxl", ("--ckpt_path", "{sd15}"), "is a Stable Diffusion 1.x or 2.x checkpoint"),
        ("sdxl", ("--ckpt_path", "nowhere.safetensors"), "--ckpt_path = 'nowhere.safetensors': no such file"),
        ("sdxl", ("--vae", "{clip_l}"), "holds no VAE"),
        ("sdxl", ("--sampler", "eulr"), "--sampler = 'eulr': expected one of"),
        ("sdxl", ("--sampler", "eulr"), "did you mean 'euler'?"),
        (
            "sdxl",
            ("--zero_terminal_snr", "--v_parameterization", "--sampler", "heun"),
            "--sampler = 'heun': expected one of ddim, ddpm, euler, k_euler, euler_a, k_euler_a, dpmsolver",
        ),
        ("sdxl", ("--lora_weights", "{clip_l}"), "is not an adapter file of this model"),
        ("sdxl", ("--promt2", "x"), "--promt2: unknown flag; did you mean --prompt2?"),
        ("sd3", ("--fp16",), "the CPU cannot compute in fp16; use bf16 or float32"),
        ("sd3", ("--fp16", "--bf16"), "--fp16"),
        ("sd3", ("--ckpt_path", "{clip_l}"), "is a CLIP text encoder, for --clip_l or --clip_g"),
        ("sd3", ("--clip_l", "{t5xxl}"), "--clip_l"),
        ("sd3", ("--t5xxl_token_length", "0"), "--t5xxl_token_length = 0: must be at least 1"),
        ("sd3", ("--flow_shift", "0"), "--flow_shift = 0.0: must be greater than 0"),
        ("sd3", ("--lora_weights", "none.safetensors"), "--lora_weights = 'none.safetensors': no such file"),
        ("chroma", ("--model_type", "flux", "--clip_l", "{clip_l}"), "is a Chroma checkpoint; add --model_type chroma"),
        ("chroma", ("--ckpt_path", "{flux1_dev}"), "is a FLUX.1 checkpoint; leave --model_type chroma out"),
        ("chroma", ("--guidance", "3.5"), "--guidance: Chroma was trained with guidance 0"),
        ("chroma", ("--t5xxl", "{clip_l}"), "--t5xxl"),
    ],
)
def test_mistakes_are_one_line(inputs, capsys, tmp_path, name, flags, text):
    models = {model: inputs.model(model) for model in ("sd15", "clip_l", "t5xxl", "flux1_dev")}
    given = [part.format(**models) for part in flags]
    with pytest.raises(SystemExit) as ended:
        main(family_of(name), [*base(name, inputs), "--output_dir", str(tmp_path), *given])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(said) == 1 and text in said[0]
    assert not list(tmp_path.iterdir())
