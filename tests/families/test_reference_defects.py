"""Where kohya-ss/sd-scripts is wrong for every family or several: what is right, shown on tiny models."""

import shutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from PIL import Image
from support.batches import step_inputs
from support.runs import FAMILY, MODEL_FLAGS, NETWORK_MODULES, network_arguments, run_training

from library import flux_utils, sd_utils
from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.safetensors_io import load_file, save_file_atomic
from library.diffusion.flow import RectifiedFlow, discrete_sigmas
from library.modules.checkpointing import checkpointed
from library.modules.components import Need
from library.modules.quantize import prepare_fp8
from library.options.checks import shared_problems
from library.sampling.prompts import make_request
from library.sampling.runner import ImageModel
from library.strategy_sd3 import Sd3DenoisingStrategy
from library.train_util import find_problems, load_family, make_options, parse_options
from library.training.conditioning import ConditioningSource
from library.training.plan import autocast_context

pytestmark = pytest.mark.family
MODELS = sorted(MODEL_FLAGS)
CPU = torch.device("cpu")


class Loaded:
    """A model with its strategies."""

    def __init__(self, name, inputs, *flags, dtype=torch.float32):
        self.family = load_family(FAMILY.get(name, name))
        self.options = parse_options(self.family.name, "network", [*inputs.base(name), "--output_dir", "o", *flags])
        self.strategies = resolve(self.family.strategies)(self.options, resolve(self.family.inspect)(self.options))
        self.components = resolve(self.family.load)(self.options, Need(dtype=dtype))
        self.components.freeze()
        self.denoiser, self.denoising = self.components.denoiser, self.strategies.denoising
        for part in (self.denoiser, self.components.vae, *self.components.text_encoders):
            if part is not None:
                part.eval()

    def source(self, dtype=torch.float32):
        encoders = self.components.text_encoders
        plain = autocast_context(CPU, dtype)
        return ConditioningSource(self.strategies, encoders, [False] * len(encoders), None, CPU, plain)

    def request(self, **values):
        return make_request(0, {"prompt": "a cat", "seed": 1, **values}, self.denoising.sample_defaults)

    def image(self, request):
        maker = ImageModel(
            maker=self.denoising,
            denoiser=self.denoiser,
            vae=self.components.vae,
            condition=self.source().for_prompt,
            device=CPU,
            autocast=autocast_context(CPU, torch.float32),
        )
        return maker.make(request)

    def inputs(self, height, width, size=1):
        """A step, the same ever again."""
        torch.manual_seed(1)
        factor = self.denoising.spatial_factor
        made = step_inputs(size, (self.denoising.latent_channels, height // factor, width // factor))
        return replace(made, sigmas=made.timesteps / 1000)


@pytest.fixture(scope="module")
def loaded(inputs):
    made = {}

    def load(name, *flags, dtype=torch.float32):
        key = name, flags, dtype
        if key not in made:
            torch.manual_seed(0)
            made[key] = Loaded(name, inputs, *flags, dtype=dtype)
        return made[key]

    return load


def sides(model):
    """A size that half the step would not divide."""
    step = model.family.latent.resolution_step
    return 3 * step if step < 64 else step, 5 * step if step < 64 else 2 * step


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anima", "chroma", "flux", "sd3", "sd35"])
def test_time_stays_in_float32(loaded, name):
    """Of these two neither the time nor the noise level differ in bfloat16."""
    model = loaded(name, dtype=torch.bfloat16)
    outputs = []
    hook = model.denoiser.register_forward_hook(lambda _, args, output: outputs.append(output))
    text = model.source(torch.bfloat16).for_prompt("a cat")
    for time in (904.5, 905.8):
        times = torch.tensor([time])
        step = replace(model.inputs(64, 64), timesteps=times, sigmas=times / 1000)
        assert step.sigmas.bfloat16() == 0.90625 and step.timesteps.bfloat16() == 904
        with torch.no_grad():
            model.denoising.predict(model.denoiser, step, text)
    hook.remove()
    assert not torch.equal(*outputs)


class Lowest:
    """A draw of the smallest number there is."""

    def uniform(self):
        return torch.zeros(1)

    def normal(self):
        return torch.full((1,), -40.0)


@pytest.mark.parametrize("scheme", ["uniform", "mode", "logit_normal"])
@pytest.mark.parametrize("scale", [1.29, -2.0])
def test_the_smallest_draw_has_a_noise_level(scheme, scale):
    process = RectifiedFlow(sampling="sigma", shift=3.0, weighting_scheme=scheme, mode_scale=scale)
    _, sigmas = process.sample([Lowest()], (8, 8))
    assert sigmas.item() in discrete_sigmas(3.0)[[0, -1]].tolist()


@pytest.mark.parametrize(("name", "shift"), [("sd3", 3.0), ("lumina", 6.0), ("anima", 3.0), ("hunyuan_image", 5.0)])
def test_levels_of_samples_are_shifted_once_and_end_without_noise(loaded, name, shift):
    model = loaded(name)
    even = torch.linspace(1, 0, 6, dtype=torch.float64)
    for given, used in (({}, shift), ({"flow_shift": 2.0}, 2.0)):
        levels = model.denoising.sample_levels(model.request(sample_steps=5, **given), torch.zeros(1, 1, 8, 8))
        assert levels.tolist() == pytest.approx((used * even / (1 + (used - 1) * even)).tolist(), abs=1e-6)
        assert levels[-1] == 0


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_any_size(loaded, name):
    """Rounded to what the model can make, and made."""
    model = loaded(name)
    request = model.request(width=81, height=109, sample_steps=1)
    multiple = {"sd": 8, "sd2": 8, "sdxl": 8, "hunyuan_image": 32}.get(name, 16)
    assert (request.width, request.height) == (max(64, 81 // multiple * multiple), 109 // multiple * multiple)
    image = model.image(request)
    assert image.shape == (3, request.height, request.width) and torch.isfinite(image).all()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_asked_of_an_unused_negative_prompt(loaded, name):
    model = loaded(name)
    calls = []
    hook = model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    model.image(model.request(width=64, height=64, sample_steps=2, scale=1.0))
    single = len(calls)
    model.image(model.request(width=64, height=64, sample_steps=2, scale=2.0, negative_prompt="a dog"))
    hook.remove()
    assert (single, len(calls) - single) == (2, 4)


def test_samples_of_chroma(loaded):
    """Guidance 0, as it was trained, and classifier-free guidance; `--g` is not read."""
    model = loaded("chroma")
    given = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, args, named: given.append(named), with_kwargs=True)
    request = model.request(width=64, height=64, sample_steps=1, guidance_scale=3.5)
    model.image(request)
    hook.remove()
    assert (request.scale, request.guidance) == (4.0, None)
    assert [named["guidance"].tolist() for named in given] == [[0.0], [0.0]]


def test_chance_of_sd3_leaves_samples_alone(loaded):
    """Neither captions of encoders nor positions change while an image is made."""
    model = loaded("sd3")
    request = model.request(width=64, height=64, sample_steps=2)
    plain = model.image(request)
    calm = model.denoising
    model.denoising = Sd3DenoisingStrategy(calm.process, dropout=(1.0, 1.0, 1.0), random_crop=1.0)
    try:
        assert torch.equal(model.image(request), plain)
    finally:
        model.denoising = calm


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_prompts_are_encoded_in_the_format_of_the_run(loaded, name):
    """Whatever the number of processes: inside autocast, as captions are."""
    model = loaded(name)
    prompts, captions = (model.source(torch.bfloat16) for _ in range(2))
    narrow, wide = prompts.for_prompt("a cat"), model.source().for_prompt("a cat")
    same = captions.get(["a cat"])
    fields = [field for field in vars(narrow) if "mask" not in field]
    assert all(torch.equal(getattr(narrow, field), getattr(same, field)) for field in fields)
    assert all(not torch.equal(getattr(narrow, field), getattr(wide, field)) for field in fields)


# --- sizes and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_step_of_sizes_can_be_trained(loaded, name):
    model = loaded(name)
    step = model.family.latent.resolution_step
    assert step == {"sd": 64, "sd2": 64, "sdxl": 32, "hunyuan_image": 32}.get(name, 16)
    for steps, count in ((step, 0), (step // 2, 1)):
        options = make_options(model.family.name, "network", {"bucket_reso_steps": steps})
        assert len(list(shared_problems(options, step))) == count
    with torch.no_grad():
        inputs = model.inputs(*sides(model))
        made = model.denoising.predict(model.denoiser, inputs, model.source().for_prompt("a cat"))
    assert made.shape == inputs.noisy.shape and torch.isfinite(made).all()


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_activations_give_the_same_gradients(inputs, loaded, name):
    model = Loaded(name, inputs)
    text = loaded(name).source().for_prompt("a cat")

    def gradient():
        step = model.inputs(64, 64)
        step.noisy.requires_grad_()
        model.denoising.predict(model.denoiser, step, text).square().sum().backward()
        return step.noisy.grad

    plain = gradient()
    calls = []
    for block in model.denoising.blocks(model.denoiser):
        block.register_forward_hook(lambda *_: calls.append(1))
        checkpointed(block, offload=True, in_eval=True)
    assert torch.equal(gradient(), plain) and plain.any()
    assert len(calls) == len(model.denoising.blocks(model.denoiser))


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_weights_of_words_have_gradients(inputs, name):
    """In captions of several windows too."""
    model = Loaded(name, inputs, "--weighted_captions", "--max_token_length", "150")
    encoders = [encoder.requires_grad_() for encoder in model.components.text_encoders]
    tokens = model.strategies.tokenize.tokenize(["a (cat:1.5) " * 40])
    found = model.strategies.text_encoding.encode_tokens(tokens, encoders)
    states = [value for field, value in vars(found).items() if field.startswith("hidden")]
    assert all(value.shape[1] == 152 for value in states)
    sum(value.square().sum() for value in vars(found).values()).backward()
    for encoder in encoders:
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(one).all() for one in gradients)
        assert max(float(one.abs().max()) for one in gradients) > 0


def test_the_tokenizer_of_a_repository_that_is_gone(inputs, tmp_path):
    """CLIP's own has the same words; padding is 0 as with the one of Stable Diffusion 2."""
    shutil.copytree(
        inputs.folder / "tokenizers" / "openai_clip-vit-large-patch14", tmp_path / "openai_clip-vit-large-patch14"
    )
    known, other = (
        Loaded("sd2", inputs, "--tokenizer_cache_dir", str(folder)).strategies.tokenize.tokenize(["a cat"])
        for folder in (inputs.folder / "tokenizers", tmp_path)
    )
    assert all(torch.equal(a, b) for a, b in zip(known, other, strict=True)) and not known[0].flatten()[-1]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sd", ("--max_token_length", "150")),
        ("sd", ("--clip_skip", "2")),
        ("sdxl", ("--max_token_length", "150")),
        ("sd3", ("--t5xxl_max_token_length", "48")),
        ("sd3", ("--apply_lg_attn_mask",)),
        ("chroma", ("--t5xxl_max_token_length", "48")),
        ("anima", ("--qwen3_max_token_length", "48")),
    ],
)
def test_caches_of_text_know_their_settings(inputs, loaded, name, flags):
    plain, changed = loaded(name).strategies, Loaded(name, inputs, *flags).strategies
    assert plain.text_outputs_caching.settings != changed.text_outputs_caching.settings


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_vae_in_the_layout_of_diffusers(inputs, loaded, tmp_path):
    state = {name: 2 * tensor for name, tensor in loaded("sd").components.vae.state_dict().items()}
    save_file_atomic(state, tmp_path / "vae.safetensors")
    options = make_options(
        "sd",
        "network",
        {"pretrained_model_name_or_path": inputs.model("sd15"), "vae": str(tmp_path / "vae.safetensors")},
    )
    sd_utils.inspect(options)
    found = sd_utils.load_components(options, Need(denoiser=False, text_encoders=False)).vae.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("narrow", [False, True])
def test_weights_in_the_other_8_bit_format(inputs, tmp_path, narrow):
    """Widened, or brought to the format that is computed with."""
    tensors = load_file(inputs.model("flux1_dev"))
    kept = {name: t.to(torch.float8_e5m2) if t.ndim > 1 else t for name, t in tensors.items()}
    save_file_atomic(kept, tmp_path / "m.safetensors")
    file, prefix = flux_utils.open_transformer(str(tmp_path / "m.safetensors"))
    prepare = (lambda model: prepare_fp8(model.double_blocks)) if narrow else None
    model = flux_utils.load_transformer(file, prefix, Need(prepare_denoiser=prepare))
    layer, expected = model.double_blocks[0].img_mlp[0], kept["double_blocks.0.img_mlp.0.weight"].float()
    given = torch.eye(layer.in_features)
    difference = layer(given) - layer.bias - expected.T
    assert difference.abs().max() <= (0.05 if narrow else 1e-6) * expected.abs().max()


# --- losses and adapters ----------------------------------------------------------------------------------------------


def test_a_part_of_a_batch_is_preserved(inputs, tmp_path):
    """An untrained adapter keeps them: their loss is zero, that of the others what it was."""
    for number, colour in enumerate(("red", "blue")):
        folder = tmp_path / f"img{number}"
        folder.mkdir()
        Image.new("RGB", (64, 64), colour).save(folder / "a.png")
        (folder / "a.txt").write_text(colour)

    def loss(*preserved):
        toml = "[[datasets]]\nbatch_size = 2\nresolution = 64\ncaption_extension = '.txt'\n"
        for number in range(2):
            toml += f"[[datasets.subsets]]\nimage_dir = '{tmp_path / f'img{number}'}'\n"
            toml += "custom_attributes = { diff_output_preservation = true }\n" if number in preserved else ""
        (tmp_path / "d.toml").write_text(toml)
        arguments = network_arguments("sd", inputs, tmp_path, tmp_path / "d.toml", "--max_train_steps", "1")
        return run_training("sd", arguments).losses[0]

    parts = loss(0), loss(1)
    assert min(parts) > 0.01 and sum(parts) == pytest.approx(loss(), rel=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("value", ["True", "true", "1"])
def test_a_trained_t5_is_not_cached(inputs, name, value):
    given = {"cache_text_encoder_outputs": True, "network_args": [f"train_t5xxl={value}"]}
    texts = [str(problem) for problem in find_problems(name, "network", make_options(name, "network", given))]
    assert sum(text.startswith("--cache_text_encoder_outputs") for text in texts) == 1
    given["network_args"] = ["train_t5xxl=false"]
    texts = [str(problem) for problem in find_problems(name, "network", make_options(name, "network", given))]
    assert not any(text.startswith("--cache_text_encoder_outputs") for text in texts)


def make_network(model, name, **arguments):
    encoders = model.components.published_text_encoders
    module = import_module(NETWORK_MODULES[name])
    given = encoders[0] if len(encoders) == 1 else list(encoders)
    return module.create_network(1.0, 4, 2.0, None, given, model.components.published_denoiser, **arguments), given


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3", "sd35", "lumina", "hunyuan_image"])
def test_split_projections_keep_their_strength(inputs, loaded, tmp_path, name):
    """Read by who knows nothing of the split: alpha / rank is what was trained."""
    model = Loaded(name, inputs)
    text = loaded(name).source().for_prompt("a cat")

    def prediction():
        with torch.no_grad():
            return model.denoising.predict(model.denoiser, model.inputs(64, 64), text)

    plain = prediction()
    network, encoders = make_network(model, name, split_qkv="true")
    assert any(module.num_parts > 1 for module in network.loras)
    network.apply_to(encoders, model.components.published_denoiser, False, True)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    network.eval()
    split = prediction()
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    network.restore_forwards()
    module = import_module(NETWORK_MODULES[name])
    denoiser = model.components.published_denoiser
    again, _ = module.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, encoders, denoiser)
    assert all(module.num_parts == 1 for module in again.loras)
    again.apply_to(encoders, denoiser, False, True)
    again.load_weights(str(tmp_path / "a.safetensors"))
    again.eval()
    change = (split - plain).abs().max()
    assert change > 1e-2 * plain.abs().max()
    assert (prediction() - split).abs().max() < 1e-4 * change


@pytest.mark.parametrize(("name", "count"), [("flux", 2), ("sd3", 3)])
def test_every_group_of_parameters_has_its_own_name(loaded, name, count):
    network, encoders = make_network(loaded(name), name, train_t5xxl="true")
    network.apply_to(encoders, loaded(name).components.published_denoiser, True, True)
    rates = [1e-4 * (number + 1) for number in range(count)]
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs(rates, 1e-3, 1e-3)
    network.restore_forwards()
    assert labels == [*(f"textencoder {number + 1}" for number in range(count)), "unet"]
    assert [group["lr"] for group in groups] == [*rates, 1e-3]


@pytest.mark.parametrize("name", sorted(NETWORK_MODULES))
def test_a_misspelt_argument_of_a_network_is_an_error(loaded, name):
    with pytest.raises(UserError, match="unknown key 'rank_droput'; did you mean rank_dropout"):
        make_network(loaded(name), name, rank_droput="0.1")
