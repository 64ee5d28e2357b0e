"""Images of Anima without training: nearly the samples of a training, every flag, mistakes."""

import json

import pytest
import torch
from PIL import Image
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.inference import main, make_images, make_inference_parser, parse_inference
from library.modules.quantize import is_fp8
from library.training import inference_run

PROMPT = "a cat on a sofa"
PROMPT_LINE = f"{PROMPT} --w 96 --h 64 --d 7 --s 3 --l 2 --fs 4 --n blurry\n"
SAME = ("--prompt", PROMPT, "--image_size", "64", "96", "--seed", "7", "--infer_steps", "3", "--flow_shift", "4")
SAME += ("--guidance_scale", "2", "--negative_prompt", "blurry", "--dtype", "float32")


def base(inputs):
    """Flags that name the model's files."""
    flags = {"--dit": "anima", "--text_encoder": "qwen3", "--vae": "qwen_image_vae"}
    named = [part for flag, name in flags.items() for part in (flag, inputs.model(name))]
    lengths = ("--qwen3_max_token_length", "32", "--t5_max_token_length", "32")
    return [*named, *lengths, "--tokenizer_cache_dir", str(inputs.folder / "tokenizers")]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Sample and adapter of a short training of transformer and text encoder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "p.txt").write_text(PROMPT_LINE)
    more = ("--sample_prompts", str(folder / "p.txt"), "--sample_every_n_steps", "2", "--max_train_steps", "2")
    arguments = network_arguments("anima", inputs, folder, dataset_toml(folder, inputs), *more)
    run_training("anima", [*arguments, "--learning_rate", "1e-1"])
    (sample,) = (folder / "out" / "sample").glob("*.png")
    return sample, folder / "out" / "last.safetensors"


@pytest.fixture
def pixels(inputs, tmp_path):
    """The image of some flags; flags given twice count as the last time."""

    def make(*flags):
        options = parse_inference("anima", [*base(inputs), *SAME, "--save_path", str(tmp_path / "out"), *flags])
        (path,) = make_images("anima", options)
        return of(path)

    return make


def of(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


def apart(one, other):
    (size, first), (other_size, second) = one, other
    assert size == other_size
    first, second = (torch.frombuffer(bytearray(data), dtype=torch.uint8).float() for data in (first, second))
    return float((first - second).abs().mean())


def test_the_image_is_the_sample_of_the_training(trained, pixels):
    """Adapters are added to the weights, so the last bits differ."""
    sample, adapter = trained
    made, plain = pixels("--lora_weight", str(adapter)), pixels()
    assert apart(made, of(sample)) < 0.01 * apart(plain, of(sample))


# flag -> what is given, beside what
ROWS = {
    "dit": (("--dit", "{model}"), ()),
    "text_encoder": (("--text_encoder", "{qwen3}"), ()),
    "vae": (("--vae", "{vae}"), ()),
    "llm_adapter_path": (("--llm_adapter_path", "{text_adapter}"), ()),
    "qwen3_max_token_length": (("--qwen3_max_token_length", "2"), ()),
    "t5_max_token_length": (("--t5_max_token_length", "40"), ()),
    "dit_dtype": (("--dit_dtype", "fp8", "--dtype", "bf16"), ("--dtype", "bf16")),
    "text_encoder_dtype": (("--text_encoder_dtype", "bf16"), ()),
    "vae_dtype": (("--vae_dtype", "bfloat16"), ()),
    "dtype": (("--dtype", "bfloat16"), ()),
    "fp8": (("--fp8",), ()),
    "fp8_scaled": (("--fp8_scaled",), ()),
    "prompt": (("--prompt", "a dog"), ()),
    "negative_prompt": (("--negative_prompt", "a dog"), ()),
    "image_size": (("--image_size", "96", "64"), ()),
    "infer_steps": (("--infer_steps", "2"), ()),
    "guidance_scale": (("--guidance_scale", "4"), ()),
    "flow_shift": (("--flow_shift", "1"), ()),
    "seed": (("--seed", "8"), ()),
    "lora_weight": (("--lora_weight", "{adapter}"), ()),
    "lora_multiplier": (("--lora_weight", "{adapter}", "--lora_multiplier", "0.5"), ("--lora_weight", "{adapter}")),
    "include_patterns": (("--lora_weight", "{adapter}", "--include_patterns", "mlp"), ("--lora_weight", "{adapter}")),
    "exclude_patterns": (("--lora_weight", "{adapter}", "--exclude_patterns", "mlp"), ("--lora_weight", "{adapter}")),
}
# shown by tests of their own
ELSEWHERE = {"save_path", "interactive", "from_file", "no_metadata", "tokenizer_cache_dir", "t5_tokenizer_path"}
ELSEWHERE |= {"attn_mode", "vae_chunk_size", "vae_disable_cache", "text_encoder_cpu", "device", "offload"}
ELSEWHERE |= {"output_type", "latent_path", "lycoris"}


@pytest.fixture(scope="module")
def places(inputs, trained, tmp_path_factory):
    """Files with other weights, and an adapter."""
    folder = tmp_path_factory.mktemp("other")
    found = {"adapter": str(trained[1])}
    for key, name in {"model": "anima", "qwen3": "qwen3", "vae": "qwen_image_vae", "text_adapter": "anima"}.items():
        changed = {n: t * 1.3 if t.ndim > 1 else t for n, t in load_file(inputs.model(name)).items()}
        found[key] = str(folder / f"{key}.safetensors")
        save_file_atomic(changed, found[key], TensorFile(inputs.model(name)).metadata)
    return found


def test_every_flag_has_a_row():
    flags = {action.dest for action in make_inference_parser("anima")._actions if action.dest != "help"}
    assert flags == set(ROWS) | ELSEWHERE


@pytest.mark.parametrize("name", ROWS)
def test_a_flag_changes_the_image(name, pixels, places):
    given, beside = ([part.format(**places) for part in flags] for flags in ROWS[name])
    assert pixels(*given) != pixels(*beside)


def test_every_flag_of_the_reference():
    """Names and defaults of kohya-ss/sd-scripts 0.10.1; those of sizes and strengths have their default in code."""
    names = "dit vae vae_chunk_size text_encoder lora_weight lora_multiplier include_patterns exclude_patterns"
    names += " negative_prompt image_size save_path seed device latent_path from_file"
    switches = "vae_disable_cache fp8 fp8_scaled text_encoder_cpu no_metadata lycoris interactive"
    expected = {
        **dict.fromkeys(names.split()),
        **dict.fromkeys(switches.split(), False),
        "guidance_scale": 3.5,
        "infer_steps": 50,
        "flow_shift": 5.0,
        "attn_mode": "torch",
        "output_type": "images",
        "prompt": "A photo of a cat",
    }
    actions = {action.dest: action for action in make_inference_parser("anima")._actions}
    assert {name: actions[name].default for name in expected} == expected
    more = "help dtype offload tokenizer_cache_dir t5_tokenizer_path llm_adapter_path"
    more += " qwen3_max_token_length t5_max_token_length dit_dtype text_encoder_dtype vae_dtype"
    assert set(actions) - set(expected) == set(more.split())
    assert actions["attn_mode"].choices == ("flash", "torch", "sageattn", "xformers", "sdpa")


def loaded_with(inputs, monkeypatch, tmp_path, *flags):
    """What was loaded, and the image's request, without making it."""
    seen = {}
    real = inference_run._load
    monkeypatch.setattr(
        inference_run, "_load", lambda *given: seen.setdefault("studio", real(*given)) or seen["studio"]
    )
    monkeypatch.setattr(inference_run, "_write", lambda studio, request, folder: seen.setdefault("request", request))
    make_images("anima", parse_inference("anima", [*base(inputs), "--save_path", str(tmp_path), *flags]))
    return seen["studio"], seen["request"]


def test_defaults_of_images(inputs, monkeypatch, tmp_path):
    _, request = loaded_with(inputs, monkeypatch, tmp_path)
    found = request.width, request.height, request.steps, request.scale, request.flow_shift
    assert found == (1024, 1024, 50, 3.5, 5.0)


def test_8_bit_weights_after_adapters_are_added(inputs, trained, monkeypatch, tmp_path):
    studio, _ = loaded_with(inputs, monkeypatch, tmp_path, "--fp8", "--lora_weight", str(trained[1]))
    layer = studio.model.denoiser.blocks[0].self_attn.q_proj
    assert is_fp8(layer) and layer.weight.dtype == torch.float8_e4m3fn and not studio.networks


@pytest.mark.parametrize(
    "flags",
    [
        ("--attn_mode", "sdpa"),
        ("--vae_chunk_size", "8"),
        ("--vae_disable_cache",),
        ("--text_encoder_cpu",),
        ("--device", "cpu"),
        ("--offload",),
        ("--lycoris",),
    ],
    ids=lambda flags: flags[0],
)
def test_ways_to_compute_make_the_same_image(pixels, flags):
    assert apart(pixels(*flags), pixels()) < 0.01


def test_a_file_of_prompts(inputs, tmp_path):
    """Lines with options; empty ones and those that begin with # are passed over."""
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na cat --d 3 --w 64 --h 64\n\na dog --d 4 --s 1 --l 1 --fs 2\n")
    flags = ("--save_path", str(tmp_path / "o"), "--from_file", str(file))
    paths = make_images("anima", parse_inference("anima", [*base(inputs), *SAME, *flags]))
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(json.loads(image.text["sample_request"]))
    assert [
        (one["prompt"], one["seed"], one["width"], one["steps"], one["scale"], one["flow_shift"]) for one in found
    ] == [
        ("a cat", 3, 64, 3, 2.0, 4.0),
        ("a dog", 4, 96, 1, 1.0, 2.0),
    ]
    (bare,) = make_images("anima", parse_inference("anima", [*base(inputs), *SAME, *flags[:2], "--no_metadata"]))
    with Image.open(bare) as image:
        assert not getattr(image, "text", {})
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="--from_file.*holds no prompt"):
        make_images("anima", parse_inference("anima", [*base(inputs), *SAME, *flags]))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--dit", "nowhere.safetensors"), "--dit = 'nowhere.safetensors': no such file"),
        (("--text_encoder", "{vae}"), "--text_encoder"),
        (("--lora_weight", "none.safetensors"), "--lora_weight = 'none.safetensors': no such file"),
        (("--lora_multiplier", "1"), "--lora_multiplier = [1.0]: has more numbers"),
        (("--image_size", "64"), "--image_size = [64]: expected two numbers"),
        (("--output_type", "latent"), "latents are not written in this version"),
        (("--latent_path", "x"), "files of latents are not read in this version"),
        (("--device", "nothing"), "--device = 'nothing': cannot be used here"),
        (("--t5_tokenizer_path", "nowhere"), "--t5_tokenizer_path = 'nowhere': is no folder with a tokenizer"),
        (("--vae_dtype", "fp8"), "--vae_dtype = 'fp8': only weights of denoiser"),
    ],
)
def test_mistakes_are_one_line(inputs, tmp_path, capsys, flags, text):
    given = [flag.format(vae=inputs.model("qwen_image_vae")) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        main("anima", [*base(inputs), *SAME, "--save_path", str(tmp_path), *given])
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert caught.value.code == 2 and line.startswith("error: ") and text in line
