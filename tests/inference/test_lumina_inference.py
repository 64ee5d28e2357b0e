"""Images of Lumina Image 2.0 without training: equal to the samples of a training, every flag."""

import sys

import pytest
from PIL import Image
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, save_file_atomic
from library.inference import make_images, make_inference_parser, parse_inference

PROMPT = "a cat on a sofa"
PROMPT_LINE = f"{PROMPT} --w 96 --h 64 --d 7 --s 3 --l 2 --n blurry\n"
SAME = ("--prompt", PROMPT, "--image_width", "96", "--image_height", "64", "--seed", "7", "--steps", "3")
SAME += ("--guidance_scale", "2", "--negative_prompt", "blurry")
WIDE = ("--dtype", "float32", "--gemma2_dtype", "float32", "--ae_dtype", "float32")


def base(inputs):
    """Flags that name the model's files."""
    flags = {"--pretrained_model_name_or_path": "lumina2", "--gemma2_path": "gemma2_2b", "--ae_path": "ae"}
    named = [part for flag, name in flags.items() for part in (flag, inputs.model(name))]
    return [*named, "--gemma2_max_token_length", "64", "--tokenizer_cache_dir", str(inputs.folder / "tokenizers")]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Sample and adapter of a short training of denoiser and text encoder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "p.txt").write_text(PROMPT_LINE)
    more = ("--sample_prompts", str(folder / "p.txt"), "--sample_every_n_steps", "2", "--system_prompt", "You help.")
    more += ("--gemma2_max_token_length", "64", "--max_train_steps", "2", "--learning_rate", "1e-1")
    run_training("lumina", network_arguments("lumina", inputs, folder, dataset_toml(folder, inputs), *more))
    (sample,) = (folder / "out" / "sample").glob("*.png")
    return sample, folder / "out" / "last.safetensors"


@pytest.fixture
def pixels(inputs, tmp_path):
    """The image of some flags; flags given twice count as the last time."""

    def make(*flags):
        given = [*base(inputs), *SAME, *WIDE, "--output_dir", str(tmp_path / "out"), *flags]
        (path,) = make_images("lumina", parse_inference("lumina", given))
        return of(path)

    return make


def of(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


def test_the_image_is_the_sample_of_the_training(trained, pixels):
    """Bit for bit: same prompts and instruction, seed, size, steps, guidance, adapter file."""
    sample, adapter = trained
    same = ("--lora_weights", str(adapter), "--system_prompt", "You help.")
    assert pixels(*same) == of(sample)
    assert pixels(*same[:2]) != of(sample) != pixels(*same[2:])


# flag -> what is given, beside what
ROWS = {
    "pretrained_model_name_or_path": (("--pretrained_model_name_or_path", "{other}"), ()),
    "gemma2_path": (("--gemma2_path", "{other_gemma}"), ()),
    "ae_path": (("--ae_path", "{other_ae}"), ()),
    "prompt": (("--prompt", "a dog"), ()),
    "negative_prompt": (("--negative_prompt", "a dog"), ()),
    "seed": (("--seed", "8"), ()),
    "steps": (("--steps", "2"), ()),
    "guidance_scale": (("--guidance_scale", "4"), ("--renorm_cfg", "0")),
    "image_width": (("--image_width", "64"), ()),
    "image_height": (("--image_height", "96"), ()),
    "dtype": (("--dtype", "bf16"), ()),
    "gemma2_dtype": (("--gemma2_dtype", "fp8"), ()),
    "ae_dtype": (("--ae_dtype", "bf16"), ()),
    "system_prompt": (("--system_prompt", "You help."), ()),
    "add_system_prompt_to_negative_prompt": (
        ("--system_prompt", "You help.", "--add_system_prompt_to_negative_prompt"),
        ("--system_prompt", "You help."),
    ),
    "gemma2_max_token_length": (("--gemma2_max_token_length", "4"), ()),
    "discrete_flow_shift": (("--discrete_flow_shift", "3"), ()),
    "cfg_trunc_ratio": (("--cfg_trunc_ratio", "0"), ()),
    "renorm_cfg": (("--renorm_cfg", "0.5"), ()),
    "lora_weights": (("--lora_weights", "{adapter}"), ()),
    "merge_lora_weights": (("--lora_weights", "{adapter}", "--merge_lora_weights"), ("--lora_weights", "{adapter}")),
}
# shown by tests of their own, here or with another family
ELSEWHERE = {"output_dir", "interactive", "tokenizer_cache_dir", "offload", "device", "use_flash_attn", "use_sage_attn"}


@pytest.fixture(scope="module")
def places(inputs, trained, tmp_path_factory):
    """Files with other weights, and an adapter."""
    folder = tmp_path_factory.mktemp("other")
    found = {"adapter": str(trained[1])}
    for key, name in {"other": "lumina2", "other_gemma": "gemma2_2b", "other_ae": "ae"}.items():
        found[key] = str(folder / f"{key}.safetensors")
        save_file_atomic({name: tensor * 1.2 for name, tensor in load_file(inputs.model(name)).items()}, found[key], {})
    return found


def test_every_flag_has_a_row():
    flags = {action.dest for action in make_inference_parser("lumina")._actions if action.dest != "help"}
    assert flags == set(ROWS) | ELSEWHERE


@pytest.mark.parametrize("name", ROWS)
def test_a_flag_changes_the_image(name, pixels, places):
    given, beside = ([part.format(**places) for part in flags] for flags in ROWS[name])
    assert pixels(*beside, *given) != pixels(*beside)


def test_every_flag_of_the_reference():
    """Names, types, defaults of kohya-ss/sd-scripts 0.10.1."""
    expected = {
        **dict.fromkeys(("pretrained_model_name_or_path", "gemma2_path", "ae_path", "seed", "device")),
        **dict.fromkeys(("offload", "merge_lora_weights", "interactive", "use_flash_attn", "use_sage_attn"), False),
        "add_system_prompt_to_negative_prompt": False,
        "prompt": "A beautiful sunset over the mountains",
        **dict.fromkeys(("negative_prompt", "system_prompt"), ""),
        "output_dir": "outputs",
        "steps": 36,
        "guidance_scale": 3.5,
        "image_width": 1024,
        "image_height": 1024,
        **dict.fromkeys(("dtype", "gemma2_dtype", "ae_dtype"), "bf16"),
        "gemma2_max_token_length": 256,
        "discrete_flow_shift": 6.0,
        "cfg_trunc_ratio": 0.25,
        "renorm_cfg": 1.0,
        "lora_weights": [],
    }
    actions = {action.dest: action for action in make_inference_parser("lumina")._actions}
    assert {name: actions[name].default for name in expected} == expected
    assert set(actions) - set(expected) == {"help", "tokenizer_cache_dir"}


def test_the_device_is_the_one_that_is_named(pixels):
    assert pixels("--device", "cpu") == pixels()
    with pytest.raises(UserError, match="--device = 'tpu9': cannot be used here"):
        pixels("--device", "tpu9")


@pytest.mark.parametrize(
    ("flag", "package"), [("--use_flash_attn", "flash_attn"), ("--use_sage_attn", "sageattention")]
)
def test_attention_of_packages_that_are_missing(pixels, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{flag}: needs the package '{package}'"):
        pixels(flag)
