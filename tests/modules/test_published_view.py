"""The view under published names: same layers, published paths, usable like the model."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.modules.published_view import published_module_paths, published_state_names, published_view

GOLDEN = Path(__file__).parents[1] / "golden"


def sdxl(channels=(32, 64, 64), depth=(1, 1, 2)):
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=2,
        cross_attention_dim=48,
        transformer_layers_per_block=depth,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 48,
    )


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return sdxl()


def test_the_leaves_are_the_same_objects(unet):
    view = published_view(unet, "sgm")
    assert view.get_submodule("input_blocks.3.0.op") is unet.down_blocks[0].downsamplers[0].conv
    assert view.get_submodule("input_blocks.4.1") is unet.down_blocks[1].attentions[0]
    assert view.get_submodule("output_blocks.2.2") is unet.up_blocks[0].upsamplers[0]
    assert view.get_submodule("output_blocks.8.0.skip_connection") is unet.up_blocks[2].resnets[2].conv_shortcut
    assert {id(p) for p in view.parameters()} == {id(p) for p in unet.parameters()}
    assert len(list(view.parameters())) == len(list(unet.parameters()))


def test_every_state_name_of_the_real_sdxl_u_net():
    """Against the key list of the published checkpoint."""
    recorded = json.loads((GOLDEN / "networks" / "sdxl_unet_names.json").read_text())
    with torch.device("meta"):
        real = sdxl((320, 640, 1280), (1, 2, 10))
    names = published_state_names(real, "sgm")
    assert len(names) == len(real.state_dict())
    assert set(names.values()) == set(recorded)
    assert names["add_embedding.linear_2.bias"] == "label_emb.0.2.bias"
    assert names["mid_block.resnets.1.conv2.weight"] == "middle_block.2.out_layers.3.weight"


def test_attributes_answer_for_the_model(unet):
    view = published_view(unet, "sgm")
    assert (view.dtype, view.device) == (torch.float32, torch.device("cpu"))
    assert view.config is unet.config
    assert not hasattr(view, "down_blocks")
    assert hasattr(view, "input_blocks")
    assert not hasattr(view, "nonsense")
    with pytest.raises(NotImplementedError):
        view(torch.zeros(1))


def test_moving_and_modes_reach_the_model():
    model = sdxl()
    view = published_view(model, "sgm")
    view.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {view.dtype}
    view.eval()
    assert not any(module.training for module in model.modules())
    view.train()
    assert all(module.training for module in model.modules())
    view.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_patched_leaf_acts_in_the_models_forward(unet):
    view = published_view(unet, "sgm")
    added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    inputs = (torch.ones(1, 4, 16, 16), 5, torch.ones(1, 3, 48))
    before = unet(*inputs, added_cond_kwargs=added).sample
    layer = view.get_submodule("middle_block.1.transformer_blocks.0.attn1.to_q")
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    after = unet(*inputs, added_cond_kwargs=added).sample
    del layer.forward
    assert not torch.equal(before, after)
    assert torch.equal(before, unet(*inputs, added_cond_kwargs=added).sample)


def clip_config():
    return CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        projection_dim=8,
        bos_token_id=18,
        eos_token_id=19,
    )


def test_clip_names_have_the_published_prefix():
    plain, projected = CLIPTextModel(clip_config()), CLIPTextModelWithProjection(clip_config())
    for model in (plain, projected):
        names = published_state_names(model, "clip")
        assert set(names) == set(model.state_dict())
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in names.values()
        assert "text_model.final_layer_norm.bias" in names.values()
    assert published_state_names(projected, "clip")["text_projection.weight"] == "text_projection.weight"
    assert published_view(plain, "clip").text_model is plain


def test_other_models_are_their_own_view():
    model = nn.Sequential(nn.Linear(2, 2))
    assert published_view(model, "own") is model
    assert published_module_paths(model, "own") == {"": "", "0": "0"}
    assert published_state_names(model, "own") == {"0.weight": "0.weight", "0.bias": "0.bias"}


def test_sd1_keeps_its_names(unet):
    view = published_view(unet, "diffusers")
    assert published_state_names(unet, "diffusers") == {name: name for name in unet.state_dict()}
    assert type(view.time_embedding).__name__ == "Sequential"
    assert view.time_embedding.linear_1 is unet.time_embedding.linear_1
