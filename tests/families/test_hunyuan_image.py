"""HunyuanImage 2.1: long and quoted prompts, samples, caches, its flags, foreign files."""

import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from PIL import Image
from support.runs import MODEL_FLAGS, dataset_toml, network_arguments, run_training
from transformers import ByT5Tokenizer

from library import hunyuan_image_utils
from library.base.errors import CheckpointError, UserError
from library.base.safetensors_io import TensorFile, load_file, read_header, save_file_atomic
from library.modules.components import Need
from library.modules.quantize import is_fp8
from library.sampling.prompts import make_request
from library.strategy_hunyuan_image import HunyuanImageConditioning, build_strategies, quoted
from library.train_util import cache_main, find_problems, make_options
from library.training import build

pytestmark = pytest.mark.family
CAPTIONS = ['a sign that says "open" and "now"', "a cat", "a temple, blue sky, with \u201cpeace\u201d on it"]
PROMPTS = """\
a cat --w 64 --h 64 --s 2 --d 1
a cat --w 64 --h 64 --s 2 --d 1 --fs 1
a cat --w 64 --h 64 --s 2
a cat --w 81 --h 100 --s 1 --d 1
"""


def options_of(inputs, **more):
    files = {flag.removeprefix("--"): inputs.model(name) for flag, name in MODEL_FLAGS["hunyuan_image"].items()}
    fixed = {"tokenizer_cache_dir": str(inputs.folder / "tokenizers"), "output_dir": "out", "dataset_config": "d.toml"}
    return make_options("hunyuan_image", "network", {**files, **fixed, **more})


def train(inputs, folder, *flags, batch_size=1, steps=1, toml=None):
    """Losses of a short training."""
    folder.mkdir(parents=True, exist_ok=True)
    toml = toml or dataset_toml(folder, inputs, batch_size=batch_size)
    arguments = network_arguments("hunyuan_image", inputs, folder, toml, *flags, "--max_train_steps", str(steps))
    return list(run_training("hunyuan_image", arguments).losses)


@pytest.fixture(scope="module")
def strategies(inputs):
    options = options_of(inputs)
    return build_strategies(options, hunyuan_image_utils.inspect(options))


@pytest.fixture(scope="module")
def encoders(inputs):
    return hunyuan_image_utils.load_components(options_of(inputs), Need(denoiser=False, vae=False)).text_encoders


def denoiser_in(inputs, dtype):
    file, prefix = hunyuan_image_utils.open_transformer(inputs.model("hunyuan_image"))
    model = hunyuan_image_utils.load_transformer(file, prefix, Need(dtype=dtype))
    return model.requires_grad_(False)


def random_text(model, length, valid, seed=0):
    """A caption of `valid` tokens, padded to `length`, that quotes nothing."""
    states = torch.randn(1, length, model.params.text_size, generator=torch.Generator().manual_seed(seed))
    return HunyuanImageConditioning(
        vlm_embed=states,
        vlm_mask=(torch.arange(length) < valid).long()[None],
        byt5_embed=torch.zeros(1, 4, model.params.glyph_size),
        byt5_mask=torch.zeros(1, 4, dtype=torch.int64),
        ocr_mask=torch.tensor([False]),
    )


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", [257, 301, 513, 777])
def test_long_prompts_keep_their_last_token(inputs, strategies, valid):
    """These lengths are no numbers of bfloat16; padding after them has no say all the same."""
    model = denoiser_in(inputs, torch.bfloat16)
    model.txt_in.c_embedder.linear_2.weight.zero_()  # the mean of all tokens would see the last one anyhow
    given = random_text(model, valid + 3, valid)
    text = given.vlm_embed.requires_grad_()
    noisy = torch.randn(1, model.params.in_channels, 2, 2, generator=torch.Generator().manual_seed(1))

    def seen(output):
        (gradient,) = torch.autograd.grad(output.float().square().sum(), text)
        return (gradient[0].abs().amax(dim=-1) > 0).tolist()

    real = [True] * valid + [False] * 3
    first = model.txt_in(text.bfloat16(), given.vlm_mask.bool(), torch.tensor([500.0]))[:, 0]
    assert seen(first) == real
    for block in model.txt_in.individual_token_refiner.blocks:
        block.self_attn_proj.weight.zero_()  # now tokens meet in the transformer's blocks only
    assert seen(strategies.denoising.velocity(model, noisy, torch.tensor([0.5]), given)) == real


def test_masks_are_whole_numbers_whatever_the_encoders_compute_in(inputs, strategies):
    need = Need(denoiser=False, vae=False, dtype=torch.bfloat16)
    narrow = hunyuan_image_utils.load_components(options_of(inputs), need).text_encoders
    prompt = "a cat on a sofa, " * 60
    with torch.no_grad():
        tokens = strategies.tokenize.tokenize_prompt(prompt)
        found = strategies.text_encoding.encode_tokens(tokens, narrow)
    assert found.vlm_embed.dtype == torch.bfloat16
    assert (found.vlm_mask.dtype, found.byt5_mask.dtype) == (torch.int64, torch.int64)
    assert found.vlm_mask.sum() == tokens[1].sum() - 34 > 256


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ('a "b" c "d e"', ["b", "d e"]),
        ("a \u201cb\u201d", ["b"]),
        ("a \u2018b\u2019", ["b"]),
        ('a \u201cx\u201d \u2018y\u2019 "z"', ["z", "y", "x"]),
        ("it's nothing", []),
    ],
)
def test_quotes_of_three_kinds(strategies, caption, parts):
    assert quoted(caption) == parts
    _, _, ids, mask, found = strategies.tokenize.tokenize([caption])
    assert found.tolist() == [bool(parts)] and mask.dtype == torch.int64
    expected = ByT5Tokenizer()("".join(f'Text "{part}". ' for part in parts)).input_ids if parts else []
    assert ids[0, : len(expected)].tolist() == expected and int(mask.sum()) == len(expected)


def test_quoted_and_plain_captions_in_one_batch_are_as_one_by_one(strategies, encoders):
    def encoded(captions):
        with torch.no_grad():
            return strategies.text_encoding.encode_tokens(strategies.tokenize.tokenize(captions), encoders)

    together = encoded(CAPTIONS)
    assert together.ocr_mask.tolist() == [True, False, True]
    assert not together.byt5_embed[1].any() and together.byt5_embed[0].any()
    for index, caption in enumerate(CAPTIONS):
        alone = encoded([caption])
        length = alone.vlm_mask.shape[1]
        row = together.item(index)
        assert torch.equal(row.byt5_mask, alone.byt5_mask) and row.vlm_mask.sum() == alone.vlm_mask.sum() == length
        assert torch.allclose(row.byt5_embed, alone.byt5_embed, atol=1e-5)
        assert torch.allclose(row.vlm_embed[:, :length], alone.vlm_embed, atol=1e-4)
        assert not row.vlm_embed[:, length:].any()


def test_captions_of_different_length_through_files(inputs, strategies, tmp_path):
    """Losses of batches are those without a cache; the files hold what other programs look for."""
    images = tmp_path / "img"
    shutil.copytree(inputs.folder / "data" / "img", images)
    for number, path in enumerate(sorted(images.glob("*.txt"))):
        path.write_text(CAPTIONS[number % 3] + ", very nice" * number)
    toml = dataset_toml(tmp_path, inputs, batch_size=2)
    toml.write_text(toml.read_text().replace(str(inputs.folder / "data" / "img"), str(images)))
    plain = train(inputs, tmp_path / "plain", toml=toml, steps=3)
    for name in ("written", "read"):
        flags = ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")
        assert train(inputs, tmp_path / name, *flags, toml=toml, steps=3) == pytest.approx(plain, rel=1e-4), name
    lengths = set()
    for path in images.glob("*_hi_te.npz"):
        text = np.load(path)
        lengths.add(len(text["vlm_mask"]))
        assert text["vlm_embed"].shape == (len(text["vlm_mask"]), 64) and text["byt5_embed"].shape == (128, 64)
        assert text["ocr_mask"].shape == () and text["ocr_mask"].dtype == bool
    assert len(lengths) > 2


def test_only_the_language_model_is_loaded(inputs, tmp_path):
    """Neither the vision tower nor the layer that predicts words, however the file calls its parts."""
    tensors = load_file(inputs.model("qwen2_5_vl"))
    known = hunyuan_image_utils.load_components(options_of(inputs), Need(denoiser=False, vae=False)).text_encoders[0]
    for renamed, seeing in (("model.", "visual."), ("model.language_model.", "model.visual.")):
        path = tmp_path / f"{seeing}safetensors"
        language = {n.replace("model.", renamed, 1): t for n, t in tensors.items() if n.startswith("model.")}
        more = {f"{seeing}patch_embed.proj.weight": torch.zeros(8, 3), "lm_head.weight": torch.zeros(559, 64)}
        save_file_atomic({**language, **more}, path, TensorFile(inputs.model("qwen2_5_vl")).metadata)
        need = Need(denoiser=False, vae=False)
        found = hunyuan_image_utils.load_components(options_of(inputs, text_encoder=str(path)), need).text_encoders[0]
        assert type(found).__name__ == "Qwen2_5_VLTextModel"
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in known.state_dict().items())
        assert {name.split(".")[0] for name in state} == {"embed_tokens", "layers", "norm"}


# --- noise levels and images ------------------------------------------------------------------------------------------


def test_noise_levels_are_whole_steps_of_float32(inputs, strategies):
    """Rounded down before the model sees them, and not rounded to bfloat16."""
    model = denoiser_in(inputs, torch.bfloat16)
    given = random_text(model, 5, 5)
    noisy = torch.randn(1, model.params.in_channels, 2, 2, generator=torch.Generator().manual_seed(1))

    def velocity(sigma):
        with torch.no_grad():
            return strategies.denoising.velocity(model, noisy, torch.tensor([sigma]), given)

    assert torch.equal(velocity(0.9031), velocity(0.9038))
    assert not torch.equal(velocity(0.9031), velocity(0.9051))  # 903 and 905 are one number in bfloat16


@pytest.mark.parametrize(("quotes", "steps", "plain"), [(False, 20, 3), (True, 20, 16), (False, 50, 6), (True, 50, 39)])
def test_guidance_changes_at_the_same_share_of_the_steps(inputs, strategies, quotes, steps, plain):
    """`plain` steps are classifier-free, the others adaptive and projected, as diffusers computes both."""
    model = denoiser_in(inputs, torch.float32)
    positive, negative = random_text(model, 5, 5), random_text(model, 4, 4, seed=1)
    object.__setattr__(positive, "ocr_mask", torch.tensor([quotes]))
    noise = torch.randn(1, model.params.in_channels, 2, 2, generator=torch.Generator().manual_seed(2))
    request = make_request(0, {"sample_steps": steps, "scale": 3.5}, strategies.denoising.sample_defaults)
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=plain - 1)
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = (5 * levels / (1 + 4 * levels)).float()
    with torch.no_grad():
        made = strategies.denoising.sample_latents(model, request, positive, negative, noise, torch.Generator())
        latents = noise
        for step in range(steps):
            guider.set_state(step=step, num_inference_steps=steps, timestep=levels[step])
            guider.prepare_inputs({"x": (noise, noise)})
            pair = [strategies.denoising.velocity(model, latents, levels[step][None], c) for c in (positive, negative)]
            latents = latents + (levels[step + 1] - levels[step]) * guider.forward(*pair).pred
    assert torch.allclose(made, latents, atol=1e-4 * float(latents.abs().max()))


def test_a_prompt_without_a_scale_is_one_call_a_step(inputs, strategies):
    """Nothing is asked of a negative prompt that is not there."""
    model = denoiser_in(inputs, torch.float32)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.randn(1, model.params.in_channels, 2, 2)
    request = make_request(0, {"sample_steps": 3, "scale": 1.0}, strategies.denoising.sample_defaults)
    with torch.no_grad():
        strategies.denoising.sample_latents(model, request, random_text(model, 5, 5), None, noise, torch.Generator())
    assert len(calls) == 3


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """Losses of a training with samples, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "p.txt").write_text(PROMPTS)
    flags = ("--sample_prompts", str(folder / "p.txt"), "--sample_every_n_steps", "1")
    return train(inputs, folder, *flags, batch_size=2), folder / "out"


def test_prompts_without_seed_with_shift_and_of_any_size(plain, strategies):
    made = sorted(path for path in (plain[1] / "sample").glob("*.png") if "sheet" not in path.name)
    images = []
    for path in made:
        with Image.open(path) as image:
            images.append((image.size, image.tobytes()))
    assert [size for size, _ in images] == [(64, 64)] * 3 + [(64, 96)]
    assert len({pixels for _, pixels in images}) == 4
    request = make_request(0, {"width": 81, "height": 100}, strategies.denoising.sample_defaults)
    assert (request.width, request.height) == (64, 96)


def test_what_files_say_of_the_training(plain):
    metadata = read_header(plain[1] / "last.safetensors")[1]
    assert metadata["ss_weighting_scheme"] == "uniform" and metadata["ss_base_model_version"] == "hunyuan-image-2.1"
    assert metadata["modelspec.architecture"] == "hunyuan-image-2.1/lora"
    assert (metadata["ss_discrete_flow_shift"], metadata["ss_model_prediction_type"]) == ("5.0", "raw")


# --- flags ------------------------------------------------------------------------------------------------------------

SAME = {
    "swapped blocks of both kinds": ("--blocks_to_swap", "3"),
    "all blocks swapped": ("--blocks_to_swap", "4"),
    "offloaded activations": ("--gradient_checkpointing", "--cpu_offload_checkpointing"),
    "another name of attention": ("--attn_mode", "sdpa"),
    "one image at a time": ("--split_attn",),
    "VAE in bands": ("--vae_chunk_size", "7"),
    "text on the CPU": ("--text_encoder_cpu",),
    "cached": ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"),
}


@pytest.mark.parametrize("name", SAME)
def test_ways_to_compute_give_the_same_losses(name, inputs, tmp_path, plain):
    assert train(inputs, tmp_path, *SAME[name], batch_size=2) == pytest.approx(plain[0], rel=1e-5)


@pytest.fixture
def components(monkeypatch):
    """What the trainings of a test load."""
    seen = []
    real = build.load
    monkeypatch.setattr(build, "load", lambda *given: seen.append(real(*given)) or seen[-1])
    return seen


def narrow_layers(model):
    return {name for name, layer in model.named_modules() if is_fp8(layer)}


def test_the_denoiser_in_8_bits(inputs, tmp_path, plain, components):
    half = ("--mixed_precision", "bf16")
    scaled = train(inputs, tmp_path / "a", "--fp8_scaled", *half, batch_size=2)
    assert scaled == train(inputs, tmp_path / "b", "--fp8_base_unet", *half, batch_size=2)
    assert scaled != plain[0] and scaled == pytest.approx(plain[0], rel=0.15)
    narrow = narrow_layers(components[0].denoiser)
    assert {name.split(".")[0] for name in narrow} == {"double_blocks", "single_blocks"}
    assert {"double_blocks.1.txt_mlp.fc2", "single_blocks.0.linear1"} <= narrow
    assert not narrow_layers(components[0].text_encoders[0])


def test_the_language_model_in_8_bits(inputs, tmp_path, plain, components):
    losses = train(inputs, tmp_path, "--fp8_vl", batch_size=2)
    assert losses != plain[0] and losses == pytest.approx(plain[0], rel=0.15)
    loaded = components[0]
    assert narrow_layers(loaded.text_encoders[0]) and not narrow_layers(loaded.text_encoders[1])
    assert not narrow_layers(loaded.denoiser)


@pytest.mark.parametrize(("flag", "narrow"), [("--fp8_scaled", "transformer"), ("--fp8_vl", "Qwen2.5-VL")])
def test_the_plan_counts_8_bits_as_a_byte(inputs, tmp_path, messages, flag, narrow):
    def sizes(*flags):
        messages.clear()
        train(inputs, tmp_path, "--dry_run", *flags)
        (line,) = (line for line in messages.text.splitlines() if line.lstrip().startswith("memory"))
        found = re.findall(r"([\w.-]+) ([\d.]+) ([KM])iB", line.partition("(")[2])
        return {name: float(number) * {"K": 1, "M": 1024}[unit] for name, number, unit in found}

    plain, small = sizes(), sizes(flag)
    assert {name for name in plain if plain[name] != small[name]} == {narrow}
    assert plain[narrow] / small[narrow] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("flag", ["--fp8_scaled", "--fp8_vl"])
def test_adapters_cannot_be_merged_into_8_bits(inputs, tmp_path, flag):
    with pytest.raises(UserError, match="--base_weights.*8-bit"):
        train(inputs, tmp_path, flag, "--base_weights", __file__)


def test_captions_are_encoded_ahead_in_8_bits_too(inputs, tmp_path):
    """By the tool as by a training."""
    images, states = tmp_path / "img", {}
    shutil.copytree(inputs.folder / "data" / "img", images)
    toml = dataset_toml(tmp_path, inputs)
    toml.write_text(toml.read_text().replace(str(inputs.folder / "data" / "img"), str(images)))
    for flags in ((), ("--fp8_vl",)):
        arguments = [*inputs.base("hunyuan_image"), "--dataset_config", str(toml), *flags]
        cache_main(["--family", "hunyuan_image", *arguments], texts=True)
        path = images / "cat_hi_te.npz"
        states[flags] = np.load(path)["vlm_embed"]
        for file in images.glob("*.npz"):
            file.unlink()
    plain, narrow = states.values()
    assert 0 < np.abs(plain - narrow).mean() < 0.2 * np.abs(plain).mean()


def test_text_encoders_stay_on_the_cpu(inputs):
    """The other parts go where the run computes."""
    elsewhere = Need(denoiser=False, device=torch.device("meta"))
    for asked, place in ((True, "cpu"), (False, "meta")):
        loaded = hunyuan_image_utils.load_components(options_of(inputs, text_encoder_cpu=asked), elsewhere)
        assert {next(encoder.parameters()).device.type for encoder in loaded.text_encoders} == {place}
        assert next(loaded.vae.parameters()).device.type == "meta"


def test_the_vae_works_in_bands(inputs, monkeypatch):
    rows = []
    real = torch.nn.functional.conv2d

    def watched(x, weight, *more, **named):
        if tuple(weight.shape[-2:]) == (3, 3):
            rows.append(x.shape[-2])
        return real(x, weight, *more, **named)

    need = Need(denoiser=False, text_encoders=False)
    vae = hunyuan_image_utils.load_components(options_of(inputs, vae_chunk_size=7), need).vae
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    with torch.no_grad():
        vae.decode(torch.zeros(1, 64, 2, 2))
    assert len(rows) > 20 and max(rows) == 7 + 2


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("pretrained_model_name_or_path", "flux1_dev", "is a FLUX.1 or Chroma transformer"),
        ("pretrained_model_name_or_path", "qwen2_5_vl", "is a Qwen2.5-VL text encoder, for --text_encoder"),
        ("pretrained_model_name_or_path", "byt5", "is a T5 encoder, for --byt5"),
        ("pretrained_model_name_or_path", "hunyuan_image_vae", "is a VAE, for --vae"),
        ("pretrained_model_name_or_path", "lumina2", "holds no HunyuanImage transformer"),
        ("text_encoder", "qwen3", "does not hold the Qwen2.5-VL text encoder"),
        ("text_encoder", "byt5", "does not hold the Qwen2.5-VL text encoder"),
        ("byt5", "t5xxl", "has states of width 256, but this model reads 64"),
        ("byt5", "qwen2_5_vl", "does not hold the byT5 text encoder"),
        ("vae", "ae", "does not hold the VAE"),
        ("vae", "hunyuan_image", "does not hold the VAE"),
    ],
)
def test_foreign_files_are_named_in_one_line(inputs, flag, name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        hunyuan_image_utils.inspect(options_of(inputs, **{flag: inputs.model(name)}))
    (problem,) = caught.value.problems
    assert f"{name}_tiny" in str(problem) and "\n" not in str(problem)


@pytest.mark.parametrize(
    ("tensor", "message"), [("guidance_in.mlp.0.weight", "distilled"), ("time_r_in.mlp.0.weight", "few steps")]
)
def test_other_variants_are_refused(inputs, tmp_path, tensor, message):
    tensors = {**load_file(inputs.model("hunyuan_image")), tensor: torch.zeros(1)}
    save_file_atomic(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"is the .*{message}.*; the base model is needed"):
        hunyuan_image_utils.inspect(options_of(inputs, pretrained_model_name_or_path=str(tmp_path / "m.safetensors")))


def test_missing_files_are_named_together():
    options = make_options("hunyuan_image", "network", {"pretrained_model_name_or_path": "m", "output_dir": "o"})
    texts = {str(problem).split(":")[0] for problem in find_problems("hunyuan_image", "network", options)}
    assert texts == {"--dataset_config", "--text_encoder", "--byt5", "--vae"}


def test_a_file_in_several_parts(inputs, tmp_path):
    tensors = load_file(inputs.model("hunyuan_image"))
    names = sorted(tensors)
    for number, part in enumerate((names[:20], names[20:]), 1):
        path = tmp_path / f"m-{number:05d}-of-00002.safetensors"
        save_file_atomic({f"model.diffusion_model.{name}": tensors[name] for name in part}, path)
    file, prefix = hunyuan_image_utils.open_transformer(str(tmp_path / "m-00001-of-00002.safetensors"))
    state = hunyuan_image_utils.load_transformer(file, prefix, Need()).state_dict()
    assert set(state) == set(tensors) and all(torch.equal(state[name], tensors[name]) for name in names)
