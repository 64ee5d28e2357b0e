"""Stable Diffusion 3 and 3.5: files, text, positions, noise levels."""

import pytest
import torch
from support.runs import MODEL_FLAGS, dataset_toml, events, network_arguments, run_training

from library import sd3_utils
from library.base.errors import CheckpointError, UserError
from library.base.safetensors_io import load_file, save_file_atomic
from library.batch import StepInputs
from library.diffusion.flow import DataFlow
from library.diffusion.noise import LevelDraw
from library.modules.components import Need
from library.options.checks import shared_problems
from library.sd3_models import scaled_table
from library.strategy_sd3 import Sd3Conditioning, Sd3DenoisingStrategy, build_strategies, joined
from library.train_util import load_family, make_options

CAPTIONS = ["a cat on a sofa", "temple, blue sky"]


def options(inputs, name="sd3", **values):
    files = {flag.removeprefix("--"): inputs.model(model) for flag, model in MODEL_FLAGS[name].items()}
    cache = {"tokenizer_cache_dir": str(inputs.folder / "tokenizers"), "t5xxl_max_token_length": 32}
    return make_options("sd3", "network", {**files, **cache, **values})


def conditioning(inputs, given):
    strategies = build_strategies(given, sd3_utils.inspect(given))
    encoders = sd3_utils.load_components(given, Need(denoiser=False, vae=False)).text_encoders
    with torch.no_grad():
        return strategies, strategies.text_encoding.encode_tokens(strategies.tokenize.tokenize(CAPTIONS), encoders)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """One file with all parts, as published, and one whose encoders lack a level."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for level in ("transformer.", ""):
        tensors = load_file(inputs.model("sd3_medium"))
        for name in ("clip_l", "clip_g", "t5xxl"):
            tensors |= {f"text_encoders.{name}.{level}{key}": t for key, t in load_file(inputs.model(name)).items()}
        found[level] = folder / f"{level or 'bare'}safetensors"
        save_file_atomic(tensors, found[level])
    return found


@pytest.mark.parametrize("level", ["transformer.", ""])
def test_encoders_inside_the_models_file(inputs, whole, level):
    _, expected = conditioning(inputs, options(inputs))
    none = {"clip_l": None, "clip_g": None, "t5xxl": None}
    _, found = conditioning(inputs, options(inputs, pretrained_model_name_or_path=str(whole[level]), **none))
    for name in Sd3Conditioning.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_flag_wins_over_the_models_file(inputs, whole, tmp_path):
    changed = {key: tensor * 1.1 for key, tensor in load_file(inputs.model("clip_g")).items()}
    save_file_atomic(changed, tmp_path / "g.safetensors")
    given = {"pretrained_model_name_or_path": str(whole["transformer."]), "clip_l": None, "t5xxl": None}
    _, found = conditioning(inputs, options(inputs, **given, clip_g=str(tmp_path / "g.safetensors")))
    _, plain = conditioning(inputs, options(inputs))
    assert torch.equal(found.l_out, plain.l_out) and not torch.equal(found.g_out, plain.g_out)


def test_without_t5_zeros_stand_for_its_states(inputs):
    strategies, found = conditioning(inputs, options(inputs, t5xxl=None))
    assert found.t5_out.shape == (2, 77, 256) and not found.t5_out.any()
    text, pooled = joined(found, {})
    assert text.shape == (2, 154, 256) and pooled.shape == (2, 192)
    packed = strategies.text_outputs_caching.pack(found.item(1))
    again = strategies.text_outputs_caching.unpack(packed)
    assert torch.equal(again.g_pooled, found.g_pooled[1:]) and torch.equal(again.l_out, found.l_out[1:])


def test_missing_encoders_and_vae_are_named(inputs, tmp_path):
    with pytest.raises(UserError) as error:
        sd3_utils.inspect(options(inputs, clip_l=None, clip_g=None))
    assert [problem.where for problem in error.value.problems] == ["--clip_l", "--clip_g"]
    start = "model.diffusion_model."
    bare = {key.removeprefix(start): t for key, t in load_file(inputs.model("sd3_medium")).items() if start in key}
    save_file_atomic(bare, tmp_path / "mmdit.safetensors")
    given = options(inputs, pretrained_model_name_or_path=str(tmp_path / "mmdit.safetensors"))
    with pytest.raises(CheckpointError, match="--vae: is needed"):
        sd3_utils.inspect(given)
    given = options(
        inputs, pretrained_model_name_or_path=str(tmp_path / "mmdit.safetensors"), vae=inputs.model("sd3_medium")
    )
    assert sd3_utils.inspect(given).name == "medium"
    assert sd3_utils.load_components(given, Need(text_encoders=False)).vae is not None


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("sdxl", "is an SDXL checkpoint"),
        ("sd15", "is a Stable Diffusion 1.x or 2.x"),
        ("flux1_dev", "is a FLUX.1 or Chroma transformer"),
        ("clip_l", "is a CLIP text encoder, for --clip_l"),
        ("t5xxl", "is a T5 encoder, for --t5xxl"),
        ("ae", "is a VAE, for --vae"),
        ("lumina2", "holds no Stable Diffusion 3 transformer"),
    ],
)
def test_other_files_are_named(inputs, model, text):
    with pytest.raises(CheckpointError, match=text):
        sd3_utils.inspect(options(inputs, pretrained_model_name_or_path=inputs.model(model)))


def test_variants_are_told_apart(inputs):
    assert [sd3_utils.inspect(options(inputs, name)).name for name in ("sd3", "sd35")] == ["medium", "5-medium"]


def test_masks_reach_the_encoders(inputs):
    _, plain = conditioning(inputs, options(inputs))
    _, clip = conditioning(inputs, options(inputs, apply_lg_attn_mask=True))
    _, t5 = conditioning(inputs, options(inputs, apply_t5_attn_mask=True))
    assert not torch.equal(plain.g_out, clip.g_out) and torch.equal(plain.t5_out, clip.t5_out)
    assert torch.equal(plain.g_out, t5.g_out) and not torch.equal(plain.t5_out, t5.t5_out)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def test_captions_are_kept_from_each_encoder_by_its_own_rate(inputs):
    denoising = Sd3DenoisingStrategy(DataFlow(), dropout=(1.0, 0.0, 0.3))
    draws = denoising.draw(generators(400))
    assert set(draws) == {"clip_l", "t5"} and draws["clip_l"].all()
    assert 80 < draws["t5"].sum() < 160
    _, found = conditioning(inputs, options(inputs))
    text, pooled = joined(found, {"clip_l": torch.tensor([1.0, 0.0]), "t5": torch.tensor([0.0, 1.0])})
    plain, whole_pooled = joined(found, {})
    assert not text[0, :77, :64].any() and torch.equal(text[0, :77, 64:], plain[0, :77, 64:])
    assert torch.equal(text[1, :77], plain[1, :77]) and not text[1, 77:].any()
    assert not pooled[0, :64].any() and torch.equal(pooled[0, 64:], whole_pooled[0, 64:])


def losses(inputs, folder, *more, name="sd3"):
    folder.mkdir()
    toml = dataset_toml(folder, inputs, batch_size=2, dataset="validation_split = 0.3")
    run_training(name, network_arguments(name, inputs, folder, toml, "--network_train_unet_only", *more))
    log = events(folder / "out")
    return [[event["loss"] for event in log if event["event"] == kind] for kind in ("step", "validation")]


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    return losses(inputs, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "flags",
    [
        ("--clip_l_dropout_rate", "1"),
        ("--clip_g_dropout_rate", "1"),
        ("--t5_dropout_rate", "1"),
        ("--pos_emb_random_crop_rate", "1"),
    ],
)
def test_chance_acts_in_steps_and_never_in_validation(inputs, plain, tmp_path, flags):
    """Before the first update validation sees the same model with and without it."""
    more = ("--validate_at_first", "--max_train_steps", "1")
    with_chance = losses(inputs, tmp_path / "a", *flags, *more)
    without = losses(inputs, tmp_path / "b", *more)
    assert with_chance[0] != without[0]
    assert with_chance[1][0] == without[1][0]


@pytest.mark.parametrize(
    "flags",
    [
        ("--training_shift", "3"),
        ("--enable_scaled_pos_embed",),
        ("--weighting_scheme", "sigma_sqrt"),
        ("--weighting_scheme", "logit_normal"),
        ("--apply_t5_attn_mask",),
        ("--t5xxl_max_token_length", "48"),
        ("--noise_offset", "0.1"),
    ],
)
def test_flags_act(inputs, plain, tmp_path, flags):
    assert losses(inputs, tmp_path / "a", *flags)[0] != plain[0]


def test_recorded_chance_is_replayed(inputs, tmp_path):
    chance = ("--t5_dropout_rate", "0.5", "--pos_emb_random_crop_rate", "0.5")
    first = losses(inputs, tmp_path / "a", *chance, "--record_steps", str(tmp_path / "record"))
    again = losses(inputs, tmp_path / "b", *chance, "--replay_steps", str(tmp_path / "record"))
    assert first[0] == again[0]


def test_tables_of_positions_by_area():
    """Each resolution has its own; a grid that is too long for it gets a larger one."""
    denoising = Sd3DenoisingStrategy(DataFlow(), scaled_positions=True)
    denoising.expect_sizes([(512, 512), (1024, 1024), (512, 512)])
    assert denoising.sides == (32, 64)

    class Model:
        params = type("params", (), {"hidden_size": 16})

    def table(rows, columns):
        return denoising._table(Model, rows, columns)

    assert torch.equal(table(32, 32), scaled_table(16, 32, 48))
    assert torch.equal(table(64, 60), scaled_table(16, 64, 96))
    assert torch.equal(table(10, 60), scaled_table(16, 32, 60))


def test_noise_levels_are_whole_steps_of_a_thousand():
    draws = [LevelDraw(generator) for generator in generators(500)]
    times, sigmas = DataFlow(min_sigma=0.2, max_sigma=0.4).sample(draws, (8, 8))
    assert torch.equal(times, times.floor()) and times.min() >= 200 and times.max() <= 399
    assert torch.equal(sigmas, times / 1000)
    shifted, _ = DataFlow(shift=3.0).sample([LevelDraw(generator) for generator in generators(500)], (8, 8))
    plain, _ = DataFlow().sample([LevelDraw(generator) for generator in generators(500)], (8, 8))
    assert torch.equal(shifted, (3 * (u := _exact(500)) / (1 + 2 * u) * 1000).floor()) and plain.mean() < shifted.mean()


def _exact(count):
    return torch.cat([LevelDraw(generator).uniform() for generator in generators(count)])


def test_weights_are_those_of_each_image():
    """sigma_sqrt undoes the square of sigma in the loss of data; without noise nothing is infinite."""
    process = DataFlow(weighting_scheme="sigma_sqrt", weighted=True)
    weight = process.weight(torch.tensor([0.0, 500.0]), None)
    assert weight[1] == pytest.approx(4.0) and torch.isfinite(weight).all()
    latents, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    sigmas = torch.tensor([0.25, 0.5])
    noisy = process.mix(latents, noise, sigmas * 1000, sigmas)
    velocity = torch.randn(2, 16, 4, 4)

    class Same(Sd3DenoisingStrategy):
        def velocity(self, *given):
            return velocity

    inputs = StepInputs(
        batch=None,
        latents=latents,
        noise=noise,
        noisy=noisy,
        timesteps=sigmas * 1000,
        sigmas=sigmas,
        target=process.target(latents, noise, sigmas),
        weight=process.weight(sigmas * 1000, sigmas),
        module_seed=0,
    )
    data = Same(process).predict(None, inputs, None)
    ours = ((data - inputs.target).square().mean((1, 2, 3)) * inputs.weight).mean()
    expected = (velocity - (noise - latents)).square().mean()
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_images_are_multiples_of_sixteen():
    """Two latent pixels make a token."""
    step = load_family("sd3").latent.resolution_step
    (problem,) = shared_problems(make_options("sd3", "network", {"bucket_reso_steps": 8}), step)
    assert "multiple of 16" in problem.message
