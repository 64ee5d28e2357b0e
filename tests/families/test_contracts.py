"""What every model family keeps, by the same tests: in one process, on its tiny model, with its script's options."""

import shutil

import pytest
import torch
from PIL import Image
from support.runs import FAMILY, MODEL_FLAGS, Inputs, dataset_toml, network_arguments, run_training

from library.base.errors import CheckpointError, UserError
from library.base.lazy import resolve
from library.base.safetensors_io import load_file
from library.families import FAMILIES
from library.modules.components import Need
from library.train_util import load_family, parse_options
from library.training.network_adapter import import_network_module

MODELS = sorted(MODEL_FLAGS)
ALIKE = {"sd2", "sd35"}  # trained by the code of their family's other model
VARIED = "flip_aug = true\ncaption_dropout_rate = 0.3\n"
WITHOUT_EIGHT_BITS = {"anima"}
UNET = ("--network_train_unet_only", "--network_dropout", "0.1")
PROMPTS = "a cat --w 64 --h 64 --s 2 --d 1\na cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 1\n"


def test_every_family_that_trains_is_here():
    trained = {name for name in FAMILIES if "network" in load_family(name).available_tasks}
    assert {FAMILY.get(name, name) for name in MODELS} == trained


def family_of(name):
    return load_family(FAMILY.get(name, name))


class Run:
    """A short training in a folder of its own."""

    def __init__(self, name, inputs, folder, *more, steps="3"):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        toml = dataset_toml(folder, inputs, batch_size=2, subset=VARIED)
        self.arguments = [*network_arguments(name, inputs, folder, toml, *UNET, *more), "--max_train_steps", steps]
        self.losses = run_training(name, self.arguments).losses
        self.tensors = load_file(folder / "out" / "last.safetensors")


def assert_same(one, other):
    assert one.losses == other.losses
    assert set(one.tensors) == set(other.tensors)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.fixture(scope="module", params=[name for name in MODELS if name not in ALIKE])
def plain(request, inputs, tmp_path_factory):
    """(model, run) that reads and encodes as it goes, recorded, with sample images at the end."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "prompts.txt").write_text(PROMPTS)
    more = ("--record_steps", str(folder / "record"), "--sample_prompts", str(folder / "prompts.txt"))
    return request.param, Run(request.param, inputs, folder, *more, "--sample_every_n_steps", "3")


def test_checkpointed_and_swapped_blocks_change_nothing(plain, inputs, tmp_path):
    name, run = plain
    assert_same(run, Run(name, inputs, tmp_path, "--gradient_checkpointing", "--blocks_to_swap", "1"))


def test_other_attention_is_the_same_attention(plain, inputs, tmp_path):
    name, run = plain
    pieces = Run(name, inputs, tmp_path / "pieces", "--mem_eff_attn", steps="1")
    assert pieces.losses[0] == pytest.approx(run.losses[0], rel=1e-5)
    if "split_attn" in parse_options(FAMILY.get(name, name), "network", run.arguments).values():
        split = Run(name, inputs, tmp_path / "split", "--split_attn", steps="1")
        assert split.losses[0] == pytest.approx(run.losses[0], rel=1e-5)


def test_compiled_blocks_are_the_same_blocks(plain, inputs, tmp_path):
    """Each block is one graph."""
    name, run = plain
    more = ("--compile", "--compile_backend", "eager", "--compile_fullgraph")
    compiled = Run(name, inputs, tmp_path, *more, steps="1")
    assert compiled.losses[0] == pytest.approx(run.losses[0], rel=1e-5)


def test_eight_bit_weights_are_nearly_the_weights(plain, inputs, tmp_path):
    name, run = plain
    more = ("--fp8_base", "--mixed_precision", "bf16")
    if name in WITHOUT_EIGHT_BITS:
        with pytest.raises(UserError, match="--fp8_base"):
            Run(name, inputs, tmp_path, *more, steps="1")
        return
    narrow = Run(name, inputs, tmp_path, *more, steps="1")
    assert narrow.losses[0] != run.losses[0]
    assert narrow.losses[0] == pytest.approx(run.losses[0], rel=0.15)


def test_cached_latents_change_nothing(plain, inputs, tmp_path):
    """In memory; then on disk, written by one run and read by the next."""
    name, run = plain
    assert_same(run, Run(name, inputs, tmp_path / "memory", "--cache_latents"))
    data = tmp_path / "data"
    shutil.copytree(inputs.folder / "data", data / "data")
    own = Inputs(data)
    for _ in range(2):
        toml = dataset_toml(tmp_path, own, batch_size=2, subset=VARIED)
        arguments = network_arguments(name, inputs, tmp_path, toml, *UNET, "--cache_latents_to_disk")
        losses = run_training(name, [*arguments, "--max_train_steps", "3"]).losses
        assert losses == run.losses
    suffix = family_of(name).latent.cache_suffix
    assert len(list((data / "data" / "img").glob(f"*{suffix}.npz"))) == 10


def test_cached_text_changes_nothing(plain, inputs, tmp_path):
    """Encoded one by one instead of in batches, so sums may differ in their last bits."""
    name, run = plain
    cached = Run(name, inputs, tmp_path, "--cache_text_encoder_outputs")
    assert cached.losses[0] == pytest.approx(run.losses[0], rel=1e-6)
    assert list(cached.losses) == pytest.approx(list(run.losses), rel=1e-4)  # Adam makes more of last bits


def test_replaying_is_the_same_run(plain, inputs, tmp_path):
    name, run = plain
    assert_same(run, Run(name, inputs, tmp_path, "--replay_steps", str(run.folder / "record")))


def test_resuming_is_not_having_stopped(plain, inputs, tmp_path):
    name, run = plain
    Run(name, inputs, tmp_path, "--save_state_on_train_end", steps="1")
    assert_same(run, Run(name, inputs, tmp_path, "--resume", "auto"))


def test_images_belong_to_their_prompts(plain):
    """The same line makes the same image, another prompt another."""
    _, run = plain
    paths = sorted(path for path in (run.folder / "out" / "sample").glob("*.png") if "sheet" not in path.name)
    images = []
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (64, 64)
            images.append(image.tobytes())
    assert len(images) == 3 and images[0] == images[1] != images[2]


def load(name, arguments):
    family = family_of(name)
    options = parse_options(family.name, "network", arguments)
    variant = resolve(family.inspect)(options)
    return resolve(family.load)(options, Need()), resolve(family.strategies)(options, variant)


def encoders_of(components):
    encoders = components.published_text_encoders
    return encoders[0] if len(encoders) == 1 else list(encoders)


def predicted(components, strategies):
    """An image from fixed noise and a prompt, before decoding."""
    from library.sampling.prompts import make_request

    defaults = strategies.denoising.sample_defaults
    request = make_request(0, {"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 2, "seed": 1}, defaults)
    with torch.no_grad():
        tokens = strategies.tokenize.tokenize_prompt("a cat")
        text = strategies.text_encoding.encode_tokens(tokens, components.text_encoders)
        factor = strategies.denoising.spatial_factor
        noise = torch.randn(
            1,
            strategies.denoising.latent_channels,
            64 // factor,
            64 // factor,
            generator=torch.Generator().manual_seed(0),
        )
        return strategies.denoising.sample_latents(
            components.denoiser, request, text, None, noise, torch.Generator().manual_seed(0)
        )


@pytest.mark.parametrize("name", MODELS)
def test_saved_is_loaded_and_applied_is_merged(name, inputs, tmp_path):
    """With text encoders where they can be trained."""
    toml = dataset_toml(tmp_path, inputs, batch_size=2)
    arguments = network_arguments(name, inputs, tmp_path, toml, "--learning_rate", "3e-2", "--max_train_steps", "2")
    run_training(name, arguments)
    file = tmp_path / "out" / "last.safetensors"
    module = import_network_module(family_of(name).default_network)
    images = {}
    for kind in ("plain", "applied", "merged"):
        components, strategies = load(name, arguments)
        encoders, denoiser = encoders_of(components), components.published_denoiser
        if kind != "plain":
            network, weights = module.create_network_from_weights(1.0, str(file), None, encoders, denoiser)
        if kind == "applied":
            network.apply_to(encoders, denoiser, True, True)
            network.load_weights(str(file))
            again = network.state_dict()
            saved = load_file(file)
            assert set(again) == set(saved) and all(torch.equal(again[key].cpu(), saved[key]) for key in saved)
        if kind == "merged":
            network.merge_to(encoders, denoiser, weights, torch.float32, "cpu")
        images[kind] = predicted(components, strategies)
    change = (images["applied"] - images["plain"]).abs().max()
    assert change > 1e-3 * images["plain"].abs().max()
    assert (images["applied"] - images["merged"]).abs().max() < 1e-3 * change


@pytest.mark.parametrize("name", MODELS)
def test_strategies_round_trip(name, inputs, tmp_path):
    """Text through the arrays of a cache file, images through the VAE."""
    toml = dataset_toml(tmp_path, inputs)
    components, strategies = load(name, network_arguments(name, inputs, tmp_path, toml))
    strategies.tokenize.check_vocabularies(components.text_encoders)
    with torch.no_grad():
        tokens = strategies.tokenize.tokenize(["a cat", "a temple, blue sky"])
        text = strategies.text_encoding.encode_tokens(tokens, components.text_encoders)
        packer = strategies.text_outputs_caching
        items = [packer.unpack(packer.pack(text.item(index))) for index in range(2)]
        again = packer.collate(items)
        for field, value in vars(text).items():
            if value is not None:
                assert torch.equal(getattr(again, field).float(), value.float()), field
        spec = family_of(name).text
        if spec is not None:
            assert set(packer.pack(text.item(0))) == set(spec.arrays)
        images = torch.rand(1, 3, 64, 64) * 2 - 1
        latents = strategies.latents_caching.encode(components.vae, images)
        factor = strategies.denoising.spatial_factor
        assert latents.shape == (1, strategies.denoising.latent_channels, 64 // factor, 64 // factor)
        decoded = strategies.denoising.decode(components.vae, strategies.denoising.scale_latents(latents))
        assert decoded.shape == images.shape and decoded.abs().max() <= 1


@pytest.mark.third_party
@pytest.mark.parametrize("name", MODELS)
def test_lycoris_trains(name, inputs, tmp_path):
    more = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp")
    run = Run(name, inputs, tmp_path, *more)
    assert len(run.losses) == 3
    assert any(
        float(tensor.abs().sum()) > 0 for key, tensor in run.tensors.items() if key.endswith(("lokr_w2", "lokr_w2_b"))
    )
    assert {key.split("_")[0] for key in run.tensors} == {"lora"}


@pytest.mark.parametrize("name", MODELS)
def test_files_of_other_models_are_named_in_one_line(name, inputs, tmp_path):
    """Whatever model stands in for this one's main file."""
    toml = dataset_toml(tmp_path, inputs)
    arguments = network_arguments(name, inputs, tmp_path, toml)
    place = arguments.index("--pretrained_model_name_or_path") + 1
    family = family_of(name)
    for other in MODELS:
        if FAMILY.get(other, other) == family.name and (other in FAMILY) == (name in FAMILY):
            continue
        if {name, other} <= {"sd", "sd2"} or {name, other} <= {"sd3", "sd35"}:
            continue  # variants that the same options train
        given = [*arguments]
        given[place] = inputs.model(MODEL_FLAGS[other]["--pretrained_model_name_or_path"])
        options = parse_options(family.name, "network", given)
        with pytest.raises((CheckpointError, UserError)) as error:
            resolve(family.inspect)(options)
        (problem,) = error.value.problems
        assert "\n" not in str(problem) and ("is a" in str(problem) or "holds no" in str(problem)), str(problem)
