"""LyCORIS as a network module: through the published view its files carry the reference's key names."""

import re

import pytest
import torch
from adapter_models import clip_encoder, golden_keys, sdxl_unet, tiny_unet
from lycoris import kohya
from safetensors.torch import load_file

from library.modules.checkpointing import checkpointed
from library.modules.published_view import published_view

pytestmark = pytest.mark.third_party


def patterns(keys):
    """Key names without block numbers and without the factors' own names."""
    return {re.sub(r"\d+", "#", key.split(".")[0]) for key in keys}


def step(unet, text_encoder, network, **inputs):
    """One micro-step and one optimizer step; the loss of the micro-step."""
    optimizer = torch.optim.SGD(network.prepare_optimizer_params(1e-2, 1e-2, 1e-2)[0])
    network.prepare_grad_etc(text_encoder, unet)
    network.on_epoch_start(text_encoder, unet)
    loss = inputs["loss"]()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_sd15_names_and_a_step(algo, tmp_path):
    torch.manual_seed(0)
    unet = tiny_unet().requires_grad_(False)
    clip = clip_encoder().requires_grad_(False)
    view = published_view(clip, "clip")
    kwargs = {"algo": algo, "conv_dim": "2", "dropout": None, "warn_on_unmatched": False}
    network = kohya.create_network(1.0, 4, 1.0, None, view, published_view(unet, "diffusers"), **kwargs)
    network.apply_to(view, unet, True, True)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for child in (*getattr(block, "attentions", ()), *block.resnets):
            checkpointed(child.train())
    context = clip(torch.tensor([[98, 5, 6, 99]])).last_hidden_state
    sample = torch.randn(1, 4, 8, 8)
    losses = [
        step(
            unet,
            view,
            network,
            loss=lambda: unet(sample, 10, clip(torch.tensor([[98, 5, 6, 99]]))[0]).sample.square().mean(),
        )
        for _ in range(2)
    ]
    assert losses[1] < losses[0]
    assert context.shape == (1, 4, 32)
    file = tmp_path / "lyco.safetensors"
    network.save_weights(str(file), torch.float32, {"ss_network_module": "lycoris.kohya"})
    found = load_file(file)
    moved = [
        value.abs().sum() for key, value in found.items() if key.endswith(("lora_up.weight", "hada_w2_a", "lokr_w2"))
    ]
    assert any(value > 0 for value in moved)
    extra = {"lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_#"}
    assert patterns(found) - extra == patterns(golden_keys("lora_sd15_conv"))


def test_sdxl_names_through_the_view(tmp_path):
    torch.manual_seed(0)
    unet = sdxl_unet(channels=(32, 64, 64), depth=(1, 1, 1), heads=(1, 2, 2), context=48, pooled=16).requires_grad_(
        False
    )
    encoders = [clip_encoder().requires_grad_(False), clip_encoder(projection=16).requires_grad_(False)]
    views, view = [published_view(encoder, "clip") for encoder in encoders], published_view(unet, "sgm")
    network = kohya.create_network(1.0, 4, 1.0, None, views, view, algo="lora", conv_dim="2", warn_on_unmatched=False)
    network.apply_to(views, view, True, True)
    sample, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 48)
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}
    losses = [
        step(
            view, views, network, loss=lambda: unet(sample, 10, context, added_cond_kwargs=added).sample.square().mean()
        )
        for _ in range(2)
    ]
    assert losses[1] < losses[0]
    file = tmp_path / "lyco.safetensors"
    network.save_weights(str(file), torch.bfloat16, {})
    found = load_file(file)
    names = {key.split(".")[0] for key in found}
    recorded = {key.split(".")[0] for key in golden_keys("lora_sdxl_conv")}
    assert names <= recorded
    assert patterns(found) == patterns(golden_keys("lora_sdxl_conv"))
    assert sum(float(value.abs().sum()) for key, value in found.items() if "lora_up" in key and "unet" in key) > 0


def test_flux_names():
    from library.flux_models import Flux, FluxParams

    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 16}
    depth = {"mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": (2, 2, 4)}
    flux = published_view(Flux(FluxParams(**sizes, **depth)), "own")
    network = kohya.create_network(1.0, 4, 1.0, None, None, flux, algo="lora", warn_on_unmatched=False)
    network.apply_to(None, flux, False, True)
    names = {key.split(".")[0] for key in network.state_dict()}
    assert names <= {key.split(".")[0] for key in golden_keys("lora_flux_flux_unet_only")}
    assert patterns(network.state_dict()) == patterns(golden_keys("lora_flux_flux_unet_only"))


def test_reload_through_the_view(tmp_path):
    torch.manual_seed(0)
    unet = sdxl_unet(channels=(32, 64, 64), depth=(1, 1, 1), heads=(1, 2, 2), context=48, pooled=16).requires_grad_(
        False
    )
    view = published_view(unet, "sgm")
    network = kohya.create_network(1.0, 4, 1.0, None, None, view, algo="lokr", factor="4", warn_on_unmatched=False)
    network.apply_to(None, view, False, True)
    file = str(tmp_path / "lyco.safetensors")
    network.save_weights(file, None, {})
    network.restore()
    again, weights = kohya.create_network_from_weights(1.0, file, None, None, view, for_inference=True)
    assert len(again.unet_loras) == len(network.unet_loras) > 0
    again.merge_to(None, view, weights, torch.float32, "cpu")
