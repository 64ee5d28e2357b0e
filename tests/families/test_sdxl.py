"""Stable Diffusion XL: files, kinds of models, captions, sizes."""

import pytest
import torch
from support.runs import dataset_toml, network_arguments, run_training

from library import sdxl_utils
from library.base.errors import CheckpointError
from library.base.safetensors_io import load_file, save_file_atomic
from library.modules.components import Need
from library.strategy_sdxl import SdxlConditioning, SdxlDenoisingStrategy, build_strategies
from library.strategy_unet import ImageSizes
from library.train_util import make_options

UNET, TEXT_2 = "model.diffusion_model.", "conditioner.embedders.1.model."


def options(inputs, **values):
    given = {"pretrained_model_name_or_path": inputs.model("sdxl"), **values}
    return make_options("sdxl", "network", {"tokenizer_cache_dir": str(inputs.folder / "tokenizers"), **given})


@pytest.fixture
def changed(inputs, tmp_path):
    """The checkpoint with something else in it."""

    def write(change, metadata=None):
        tensors = load_file(inputs.model("sdxl"))
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file_atomic(tensors, path, metadata or {})
        return options(inputs, pretrained_model_name_or_path=str(path))

    return write


def refiner(tensors):
    for name in [name for name in tensors if name.startswith("conditioner.embedders.0.")]:
        del tensors[name]
    for name in [name for name in tensors if name.startswith(TEXT_2)]:
        tensors[name.replace("embedders.1.", "embedders.0.")] = tensors.pop(name)


def without_second_encoder(tensors):
    for name in [name for name in tensors if name.startswith(TEXT_2)]:
        del tensors[name]


def nine_channels(tensors):
    weight = tensors[f"{UNET}input_blocks.0.0.weight"]
    tensors[f"{UNET}input_blocks.0.0.weight"] = torch.cat((weight, torch.zeros(32, 5, 3, 3)), dim=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (refiner, "is an SDXL refiner"),
        (without_second_encoder, "has no OpenCLIP bigG text encoder"),
        (nine_channels, "is an inpainting model .9 channels.; add --train_inpainting"),
        (lambda tensors: tensors.update(v_pred=torch.zeros(1)), "its mark: v_pred.; add --v_parameterization$"),
        (lambda tensors: tensors.update(v_pred=torch.zeros(1), ztsnr=torch.zeros(1)), "and --zero_terminal_snr"),
    ],
    ids=["refiner", "half", "inpainting", "velocity", "zero terminal"],
)
def test_kinds_of_models_are_recognised(changed, change, text):
    with pytest.raises(CheckpointError, match=text):
        sdxl_utils.inspect(changed(change))


def test_metadata_that_says_velocity(changed, inputs):
    given = changed(lambda tensors: None, {"modelspec.prediction_type": "v"})
    with pytest.raises(CheckpointError, match="its mark: modelspec"):
        sdxl_utils.inspect(given)
    path = given.value("pretrained_model_name_or_path")
    agreed = options(inputs, pretrained_model_name_or_path=path, v_parameterization=True)
    variant = sdxl_utils.inspect(agreed)
    assert sdxl_utils.model_spec(variant)["prediction_type"] == "v"


@pytest.mark.parametrize(
    ("model", "text"), [("sd15", "is a Stable Diffusion 1.x or 2.x"), ("flux1_dev", "holds no SDXL")]
)
def test_other_families_are_named(inputs, model, text):
    with pytest.raises(CheckpointError, match=text):
        sdxl_utils.inspect(options(inputs, pretrained_model_name_or_path=inputs.model(model)))


def test_another_vae(inputs, tmp_path):
    """Below a prefix or bare; a file without one is named."""
    prefix = "first_stage_model."
    bare = {name.removeprefix(prefix): 2 * t for name, t in load_file(inputs.model("sd15")).items() if prefix in name}
    save_file_atomic(bare, tmp_path / "vae.safetensors")
    need = Need(denoiser=False, text_encoders=False)
    found = [
        sdxl_utils.load_components(options(inputs, vae=vae), need).vae.encoder.conv_in.weight
        for vae in (None, inputs.model("sd15"), str(tmp_path / "vae.safetensors"))
    ]
    assert not torch.equal(found[0], found[1]) and torch.equal(2 * found[1], found[2])
    with pytest.raises(CheckpointError, match="--vae.*holds no VAE"):
        sdxl_utils.inspect(options(inputs, vae=inputs.model("clip_l")))


def losses(inputs, folder, *more, name="sdxl"):
    folder.mkdir()
    toml = dataset_toml(folder, inputs, batch_size=2)
    run_training(name, [*network_arguments(name, inputs, folder, toml), "--max_train_steps", "2", *more])
    return load_file(folder / "out" / "last.safetensors")


def test_an_inpainting_model_is_trained(inputs, changed, tmp_path):
    """Its own nine channels are used; an ordinary model gets five of zeros."""
    path = changed(nine_channels).value("pretrained_model_name_or_path")
    more = ("--train_inpainting", "--network_train_unet_only")
    own = losses(inputs, tmp_path / "own", *more, "--pretrained_model_name_or_path", path)
    made = losses(inputs, tmp_path / "made", *more)
    assert all(torch.equal(own[name], made[name]) for name in own)


def call(sizes, seen):
    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, noisy, times, context, added_cond_kwargs):
            seen.update(added_cond_kwargs, context=context)
            return type("Out", (), {"sample": noisy})

    text = SdxlConditioning(torch.zeros(1, 77, 2), torch.ones(1, 77, 3), torch.ones(1, 4))
    SdxlDenoisingStrategy(_Process(), 1.0).call(Unet(), torch.zeros(1, 4, 8, 8), torch.zeros(1), text, sizes)


class _Process:
    zero_terminal = False


def test_the_model_is_told_of_sizes_and_crops():
    """Original height and width, top and left of the crop, trained height and width; both texts side by side."""
    seen = {}
    numbers = [torch.tensor([pair]) for pair in ([640, 480], [8, 16], [128, 96])]
    call(ImageSizes(*numbers), seen)
    assert seen["time_ids"].tolist() == [[640, 480, 8, 16, 128, 96]]
    assert seen["context"].shape == (1, 77, 5) and seen["text_embeds"].shape == (1, 4)
    call(ImageSizes.whole(512, 768), seen)
    assert seen["time_ids"].tolist() == [[512, 768, 0, 0, 512, 768]]


def test_weights_of_words_are_cached_too(inputs, tmp_path):
    cached = ("--cache_text_encoder_outputs", "--network_train_unet_only", "--caption_prefix", "(photo:1.8) ")
    plain = losses(inputs, tmp_path / "plain", *cached)
    weighted = losses(inputs, tmp_path / "weighted", *cached, "--weighted_captions")
    live = losses(inputs, tmp_path / "live", *cached[1:], "--weighted_captions")
    name = next(name for name in plain if name.endswith("lora_up.weight"))
    assert not torch.equal(plain[name], weighted[name])
    assert torch.allclose(weighted[name], live[name], atol=1e-5)


def test_weights_act_on_states_and_not_on_the_pooled_text(inputs):
    given = options(inputs, weighted_captions=True)
    strategies = build_strategies(given, sdxl_utils.inspect(given))
    encoders = sdxl_utils.load_components(given, Need(denoiser=False, vae=False)).text_encoders
    with torch.no_grad():
        plain, heavy = (
            strategies.text_encoding.encode_tokens(strategies.tokenize.tokenize([text]), encoders)
            for text in ("a cat", "a (cat:1.5)")
        )
    assert torch.equal(plain.pool2, heavy.pool2)
    ratio = heavy.hidden_state2 / plain.hidden_state2
    assert ratio.max() == pytest.approx(1.5, abs=1e-3) and ratio.min() == pytest.approx(1.0, abs=1e-3)


def test_rates_of_both_text_encoders(inputs, tmp_path):
    """One rate for each; a rate of zero leaves an encoder as it was."""
    found = losses(inputs, tmp_path / "a", "--text_encoder_lr", "0", "1e-2")
    moved = {
        start: any(t.any() for name, t in found.items() if name.startswith(start) and "lora_up" in name)
        for start in ("lora_te1_", "lora_te2_", "lora_unet_")
    }
    assert moved == {"lora_te1_": False, "lora_te2_": True, "lora_unet_": True}
