"""Files of `--save_also_as diffusers` in diffusers' own loaders: the change is the one of our forward."""

from types import SimpleNamespace

import pytest
import torch
from support.diffusers_layout import to_diffusers
from support.runs import FAMILY, dataset_toml, network_arguments, run_training

from library import flux_utils
from library.base.errors import UserError
from library.base.lazy import resolve
from library.base.safetensors_io import TensorFile, load_file
from library.modules import unet
from library.modules.components import Need
from library.modules.dialects import Exporter
from library.train_util import load_family, parse_options
from library.training.network_adapter import import_network_module

pytestmark = pytest.mark.third_party


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    """(folder, loaded model) of a short training with large steps; each made once."""
    made = {}

    def export(name, *more):
        if (name, more) not in made:
            folder = tmp_path_factory.mktemp(name)
            arguments = network_arguments(name, inputs, folder, dataset_toml(folder, inputs), *more)
            arguments += ["--save_also_as", "comfy,diffusers", "--learning_rate", "2e-2", "--save_every_n_steps", "3"]
            run_training(name, arguments)
            made[name, more] = folder / "out", arguments
        folder, arguments = made[name, more]
        family = FAMILY.get(name, name)
        options = parse_options(family, "network", arguments)
        return folder, lambda: resolve(load_family(family).load)(options, Need())

    return export


def apply(name, components, file):
    """Let an adapter file act in our model."""
    module = import_network_module(load_family(FAMILY.get(name, name)).default_network)
    encoders = components.published_text_encoders
    encoders = encoders[0] if len(encoders) == 1 else list(encoders)
    network, _ = module.create_network_from_weights(1.0, str(file), None, encoders, components.published_denoiser)
    network.apply_to(encoders, components.published_denoiser, True, True)
    network.load_weights(str(file))
    return network


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def unet_pipeline(name, components):
    """diffusers' pipeline over our own modules."""
    import diffusers

    encoders = components.text_encoders
    common = {"vae": components.vae, "unet": components.denoiser, "scheduler": diffusers.DDIMScheduler()}
    tokenizers = {"text_encoder": encoders[0], "tokenizer": None}
    if name == "sdxl":
        more = {"text_encoder_2": encoders[1], "tokenizer_2": None}
        return diffusers.StableDiffusionXLPipeline(**common, **tokenizers, **more)
    checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**common, **tokenizers, **checks)


def unet_outputs(name, components):
    """Of every text encoder and the U-Net."""
    ids = torch.tensor([[912, 20, 31, 913] + [913] * 73])
    with torch.no_grad():
        texts = [encoder(ids, output_hidden_states=True) for encoder in components.text_encoders]
        states = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        added = None
        if name == "sdxl":
            sizes = torch.tensor([[100, 100, 0, 0, 128, 128]])
            added = {"text_embeds": texts[1].text_embeds, "time_ids": sizes}
        sample = components.denoiser(noise(1, 4, 16, 16), torch.tensor([400]), states, added_cond_kwargs=added).sample
    return [states, sample]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("more", [(), ("--network_args", "conv_dim=2", "conv_alpha=1")], ids=["linear", "conv"])
def test_pipelines_with_a_unet(name, more, exported):
    folder, load = exported(name, *more)
    plain = unet_outputs(name, load())
    ours = load()
    apply(name, ours, folder / "last.safetensors")
    theirs = load()
    unet_pipeline(name, theirs).load_lora_weights(str(folder), weight_name="last-diffusers.safetensors")
    compare(plain, unet_outputs(name, ours), unet_outputs(name, theirs))


def compare(plain, ours, theirs):
    for before, mine, other in zip(plain, ours, theirs, strict=True):
        assert (mine - before).abs().max() > 1e-2 * before.abs().max()
        assert (mine - other).abs().max() <= 1e-4 * mine.abs().max()


def flux_call(components):
    """Our forward and its inputs."""
    from library.flux_models import image_ids, pack_latents

    given = {
        "img": pack_latents(noise(1, 16, 6, 4)),
        "img_ids": image_ids(1, 6, 4, "cpu"),
        "txt": noise(1, 7, 256),
        "txt_ids": torch.zeros(1, 7, 3),
        "times": torch.tensor([0.4]),
    }
    return given, components.denoiser


def diffusers_flux(components):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FluxPipeline, FluxTransformer2DModel

    p, ours = components.denoiser.params, components.denoiser
    sizes = {
        "in_channels": p.in_channels,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single_blocks,
        "attention_head_dim": p.hidden_size // p.num_heads,
        "num_attention_heads": p.num_heads,
        "joint_attention_dim": p.context_in_dim,
        "axes_dims_rope": p.axes_dim,
    }
    empty = {"scheduler": None, "vae": None, "text_encoder": None, "tokenizer": None}
    if components.variant.name == "chroma":
        layer = ours.distilled_guidance_layer
        transformer = ChromaTransformer2DModel(
            **sizes,
            approximator_num_channels=layer.in_proj.in_features,
            approximator_hidden_dim=layer.in_proj.out_features,
            approximator_layers=len(layer.layers),
        )
        pipeline = ChromaPipeline(**empty, transformer=transformer)
    else:
        transformer = FluxTransformer2DModel(**sizes, pooled_projection_dim=p.vec_in_dim, guidance_embeds=True)
        pipeline = FluxPipeline(**empty, text_encoder_2=None, tokenizer_2=None, transformer=transformer)
        pipeline.register_modules(text_encoder=components.text_encoders[0])
    transformer.load_state_dict(to_diffusers(ours.state_dict(), flux_utils.DIFFUSERS_LAYERS))
    return pipeline


@pytest.mark.parametrize("name", ["flux", "chroma"])
@pytest.mark.parametrize("more", [(), ("--network_args", "in_dims=4,4,4,4,4", "split_qkv=True")], ids=["blocks", "all"])
def test_flux_pipelines(name, more, exported):
    if name == "chroma" and more:
        more = ("--network_args", "split_qkv=True")
    folder, load = exported(name, *more)
    components = load()
    given, ours = flux_call(components)
    pipeline = diffusers_flux(components)
    dev = name == "flux"
    pooled, guidance = noise(1, 64), torch.tensor([3.5])
    ids = torch.tensor([[912, 20, 31, 913] + [913] * 73])

    def mine():
        extra = {"pooled": pooled, "guidance": guidance} if dev else {}
        with torch.no_grad():
            text = [components.text_encoders[0](ids).pooler_output] if dev else []
            return [ours(**given, **extra), *text]

    plain = mine()
    pipeline.load_lora_weights(str(folder), weight_name="last-diffusers.safetensors")
    extra = {"pooled_projections": pooled, "guidance": guidance} if dev else {}
    with torch.no_grad():
        theirs = [
            pipeline.transformer(
                hidden_states=given["img"],
                img_ids=given["img_ids"][0],
                encoder_hidden_states=given["txt"],
                txt_ids=given["txt_ids"][0],
                timestep=given["times"],
                return_dict=False,
                **extra,
            )[0]
        ]
        theirs += [pipeline.text_encoder(ids).pooler_output] if dev else []
    pipeline.unload_lora_weights()
    apply(name, components, folder / "last.safetensors")
    compare(plain, mine(), theirs)


def test_comfy_names_and_factors(exported):
    """Dotted paths of ComfyUI's model tree; the same factors and alpha."""
    folder, _ = exported("flux")
    default, comfy = load_file(folder / "last.safetensors"), load_file(folder / "last-comfy.safetensors")
    assert len(default) == len(comfy)
    ours, theirs = "lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"
    assert torch.equal(default[f"{ours}.lora_down.weight"], comfy[f"{theirs}.lora_A.weight"])
    assert torch.equal(default[f"{ours}.lora_up.weight"], comfy[f"{theirs}.lora_B.weight"])
    assert float(default[f"{ours}.alpha"]) == float(comfy[f"{theirs}.alpha"])
    tower = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    assert f"{tower}.lora_A.weight" in comfy
    folder, _ = exported("sd")
    plain, same = load_file(folder / "last.safetensors"), load_file(folder / "last-comfy.safetensors")
    assert set(plain) == set(same) and all(torch.equal(plain[name], same[name]) for name in plain)


def test_every_saved_file_has_its_dialects_and_metadata(exported):
    folder, _ = exported("flux")
    names = {path.name for path in folder.glob("*.safetensors")}
    starts = ("last", "last-step00000003")
    assert names == {f"{start}{end}.safetensors" for start in starts for end in ("", "-comfy", "-diffusers")}
    metadata = TensorFile(folder / "last-diffusers.safetensors").metadata
    assert metadata["ss_dialect"] == "diffusers" and metadata["ss_network_dim"] == "4"
    assert "sshs_model_hash" not in metadata


def test_old_results_go_with_their_dialects(inputs, tmp_path):
    arguments = network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--save_also_as", "comfy")
    run_training("flux", [*arguments, "--save_every_n_steps", "1", "--save_last_n_steps", "1", "--ema_decay", "0.9"])
    ends = ("", "-ema", "-comfy", "-ema-comfy")
    expected = {f"last{number}{end}.safetensors" for number in ("", "-step00000003", "-step00000004") for end in ends}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == expected


def test_what_cannot_be_written_so_is_said_before_training(inputs, tmp_path):
    more = ("--save_also_as", "diffusers", "--network_module", "lycoris.kohya", "--network_args", "algo=lokr")
    arguments = network_arguments("sd", inputs, tmp_path, dataset_toml(tmp_path, inputs), *more)
    with pytest.raises(UserError, match="only LoRA files can be written so"):
        run_training("sd", arguments)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_file_that_does_not_hold_what_was_written(exported, monkeypatch, tmp_path):
    folder, load = exported("sd")
    exporter = Exporter(load_family("sd").exports, load())
    (tmp_path / "a.safetensors").write_bytes((folder / "last.safetensors").read_bytes())
    from library.modules import dialects

    def damaged(tensors, path, metadata):
        name = next(iter(tensors))
        real({**tensors, name: tensors[name] + 1}, path, metadata)

    real = dialects.save_file_atomic
    monkeypatch.setattr(dialects, "save_file_atomic", damaged)
    with pytest.raises(UserError, match="does not hold what was written"):
        exporter.export(tmp_path / "a.safetensors", ["comfy"])


def test_unknown_dialects_are_named():
    options = SimpleNamespace(argv=["--save_also_as", "comfy,kohya"])
    problems = [str(problem) for problem in parse_options("sd", "network", options.argv).problems()]
    assert problems == ["--save_also_as = 'comfy,kohya': expected comfy or diffusers, or both with a comma"]


def test_projections_of_version_2_are_linear_in_diffusers(inputs, exported):
    """Ours are convolutions of one pixel, as other trainers write them."""
    folder, load = exported("sd2", "--network_train_unet_only")
    components = load()
    sample, times, text = noise(1, 4, 16, 16), torch.tensor([400]), noise(1, 77, 64)
    file = TensorFile(inputs.model("sd21"))
    linear = unet.load_unet(file, Need(), use_linear_projection=True)
    with torch.no_grad():
        plain = components.denoiser(sample, times, text).sample
        compare([plain * 2], [plain], [linear(sample, times, text).sample])  # the same model
        linear.load_lora_adapter(load_file(folder / "last-diffusers.safetensors"), prefix="unet")
        apply("sd2", components, folder / "last.safetensors")
        ours, theirs = components.denoiser(sample, times, text).sample, linear(sample, times, text).sample
    compare([plain], [ours], [theirs])
