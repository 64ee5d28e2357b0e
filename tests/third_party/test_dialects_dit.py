"""`--save_also_as` of SD3, HunyuanImage and Anima: diffusers' loaders give the change of our forward."""

import pytest
import torch
from support import diffusers_models
from support.runs import FAMILY, MODEL_FLAGS, dataset_toml, network_arguments, run_training

from library.base.lazy import resolve
from library.base.safetensors_io import load_file
from library.modules.components import Need
from library.train_util import load_family, parse_options
from library.training.network_adapter import import_network_module

pytestmark = pytest.mark.third_party


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    """(folder with the files of a short training with large steps, function that loads the model); each made once."""
    made = {}

    def export(name, *more):
        if (name, more) not in made:
            folder = tmp_path_factory.mktemp(name)
            arguments = network_arguments(name, inputs, folder, dataset_toml(folder, inputs), *more)
            arguments += ["--save_also_as", "comfy,diffusers", "--learning_rate", "2e-2", "--max_train_steps", "3"]
            run_training(name, arguments)
            made[name, more] = folder / "out", arguments
        folder, arguments = made[name, more]
        family = load_family(FAMILY.get(name, name))
        options = parse_options(family.name, "network", arguments)
        return folder, lambda: resolve(family.load)(options, Need())

    return export


def apply(name, components, file):
    module = import_network_module(load_family(FAMILY.get(name, name)).default_network)
    encoders = components.published_text_encoders
    encoders = encoders[0] if len(encoders) == 1 else list(encoders)
    network, _ = module.create_network_from_weights(1.0, str(file), None, encoders, components.published_denoiser)
    network.apply_to(encoders, components.published_denoiser, True, True)
    network.load_weights(str(file))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def compare(plain, ours, theirs):
    for before, mine, other in zip(plain, ours, theirs, strict=True):
        assert (mine - before).abs().max() > 1e-2 * before.abs().max()
        assert (mine - other).abs().max() <= 1e-4 * mine.abs().max()


EMBEDDERS = ("--network_args", "emb_dims=4,4,4,4,4,4", "split_qkv=True")


@pytest.mark.parametrize(("name", "more"), [("sd3", ()), ("sd35", ()), ("sd35", EMBEDDERS)])
def test_sd3_pipeline(name, more, exported):
    from diffusers import StableDiffusion3Pipeline

    folder, load = exported(name, *more)
    components = load()
    ids = torch.tensor([[912, 20, 31, 913] + [913] * 73])
    latents, text, pooled = noise(1, 16, 8, 12), noise(1, 9, 256), noise(1, 192)
    times = torch.tensor([400.0])

    def texts(encoders):
        return [encoder(ids, output_hidden_states=True).hidden_states[-2] for encoder in encoders]

    def ours():
        with torch.no_grad():
            return [components.denoiser(latents, times, text, pooled), *texts(components.text_encoders[:2])]

    plain = ours()
    other = load()
    pipeline = StableDiffusion3Pipeline(
        transformer=diffusers_models.sd3(other.denoiser),
        scheduler=None,
        vae=None,
        text_encoder=other.text_encoders[0],
        tokenizer=None,
        text_encoder_2=other.text_encoders[1],
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.load_lora_weights(str(folder), weight_name="last-diffusers.safetensors")
    with torch.no_grad():
        theirs = [pipeline.transformer(latents, text, pooled, times, return_dict=False)[0]]
        theirs += texts([pipeline.text_encoder, pipeline.text_encoder_2])
    apply(name, components, folder / "last.safetensors")
    compare(plain, ours(), theirs)


@pytest.mark.parametrize("more", [(), ("--network_args", "split_qkv=True")], ids=["fused", "split"])
def test_hunyuan_image_transformer(exported, more):
    folder, load = exported("hunyuan_image", *more)
    components = load()
    given = {
        "latents": noise(1, 64, 4, 6),
        "timesteps": torch.tensor([400.0]),
        "text": noise(1, 7, 64),
        "text_mask": torch.tensor([[1] * 5 + [0] * 2]),
        "glyphs": noise(1, 8, 64),
        "glyph_mask": torch.tensor([[1] * 3 + [0] * 5]),
    }
    with torch.no_grad():
        plain = components.denoiser(**given)
        theirs = diffusers_models.hunyuan_image(components.denoiser)
        theirs.load_lora_adapter(load_file(folder / "last-diffusers.safetensors"), prefix="transformer")
        other = diffusers_models.call_hunyuan_image(theirs, given)
        apply("hunyuan_image", components, folder / "last.safetensors")
        compare([plain], [components.denoiser(**given)], [other])


@pytest.mark.parametrize("more", [(), ("--network_args", "train_llm_adapter=true")], ids=["blocks", "adapter"])
def test_anima_loader(exported, more, monkeypatch):
    """The transformer's part, and with a trained text adapter its part too."""
    from diffusers.loaders import AnimaLoraLoaderMixin

    folder, load = exported("anima", "--network_train_unet_only", *more)
    components = load()
    ours = components.denoiser
    latents, times, context = noise(1, 16, 8, 12), torch.tensor([0.4]), noise(1, 9, ours.params.context_dim)

    class Loader(AnimaLoraLoaderMixin):
        transformer = diffusers_models.anima(ours, monkeypatch)
        text_conditioner, hf_device_map, components = None, None, {}

    if more:
        Loader.text_conditioner = conditioner(ours)
    source, ids = noise(1, 7, ours.params.adapter.source_dim), torch.tensor([[5, 9, 1]])
    source_mask, mask = torch.ones(1, 7, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)

    def mine():
        with torch.no_grad():
            found = [ours.denoise(latents, times, context)]
            return [*found, ours.llm_adapter(source, source_mask, ids, mask)] if more else found

    plain = mine()
    loader = Loader()
    loader.load_lora_weights(str(folder), weight_name="last-diffusers.safetensors")
    with torch.no_grad():
        theirs = [diffusers_models.call_anima(loader.transformer, latents, times, context)]
        if more:
            theirs.append(loader.text_conditioner(source, ids, mask, source_mask)[:, :3])
    apply("anima", components, folder / "last.safetensors")
    compare(plain, mine(), theirs)


def conditioner(ours):
    """diffusers' text adapter with the weights of ours."""
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    p = ours.params.adapter
    model = AnimaTextConditioner(p.source_dim, p.target_dim, p.model_dim, p.depth, p.num_heads, 4.0, p.vocab_size)
    model.load_state_dict(ours.llm_adapter.state_dict())
    model.register_to_config(min_sequence_length=3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", sorted(MODEL_FLAGS))
def test_every_layer_has_a_name_in_comfy_and_diffusers(name, exported):
    """As many adapters as in the default file, but for parts that diffusers' loaders leave out."""
    folder, _ = exported(name, "--network_train_unet_only")
    counts = [
        sum(key.endswith(end) for key in load_file(folder / f"last{kind}.safetensors"))
        for kind, end in (("", ".alpha"), ("-comfy", ".alpha"), ("-diffusers", ".lora_A.weight"))
    ]
    assert counts[0] == counts[1] <= counts[2]
    expected = {"hunyuan_image": "double_blocks.0.img_attn.qkv", "anima": "blocks.0.self_attn.q_proj"}
    if name in expected:
        assert f"diffusion_model.{expected[name]}.lora_A.weight" in load_file(folder / "last-comfy.safetensors")
