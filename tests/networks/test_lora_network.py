"""The network object: arguments, groups, norms, files, merging."""

import math
import os

import pytest
import torch
from adapter_models import GOLDEN, TinyUNet, golden_notes, golden_tensors, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.base.errors import CheckpointError, UserError
from networks import lora, lora_flux
from networks.engine.arguments import Arguments, parse_arguments
from networks.engine.modules import LoRAModule
from networks.engine.param_groups import block_factors, sgm_block_index, unet_block_index

QUERY, KEY = (f"lora_unet_down_blocks_0_attentions_0_to_{letter}" for letter in "qk")


def create(unet, **kwargs):
    net = lora.create_network(1.0, 4, 2.0, None, None, unet, **kwargs)
    net.apply_to(None, unet, False, True)
    return net


# --- arguments -------------------------------------------------------------------------------------------------------


def test_mistakes_are_reported_together_and_named(unet):
    with pytest.raises(UserError) as caught:
        lora.create_network(1.0, 4, 1.0, None, None, unet, conv_dims="4", rank_dropout="1.5", block_dims="a,b")
    text = str(caught.value)
    assert "--network_args = 'conv_dims=4'" in text
    assert "did you mean conv_dim?" in text
    assert "'rank_dropout=1.5': expected a probability" in text
    assert "block_dims=a,b" in text


def test_the_injected_dropout_is_known_and_used(unet):
    assert create(unet, dropout=None, neuron_dropout=0.5).loras[0].dropout == 0.5
    assert lora.create_network(1.0, 4, 1.0, None, None, TinyUNet(), dropout="0.25").loras[0].dropout == 0.25


@pytest.mark.parametrize("text, expected", [("True", True), ("1", True), ("yes", True), ("false", False), ("0", False)])
def test_booleans_in_every_usual_spelling(text, expected):
    assert parse_arguments(lora_flux.TABLE.arguments, {"split_qkv": text})["split_qkv"] is expected


@pytest.mark.parametrize(
    "key, value",
    [
        ("split_qkv", "maybe"),
        ("train_blocks", "singles"),
        ("in_dims", "1,2"),
        ("train_double_block_indices", "5-2"),
        ("network_reg_dims", "img_attn"),
        ("network_reg_lrs", "(=1e-4"),
        ("ggpo_sigma", "-1"),
    ],
)
def test_bad_values_are_errors(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        parse_arguments(lora_flux.TABLE.arguments, {key: value})


def test_block_indices():
    parsed = parse_arguments(lora_flux.TABLE.arguments, {"train_single_block_indices": "0-3,5"})
    assert parsed["train_single_block_indices"] == frozenset({0, 1, 2, 3, 5})
    assert parsed["train_double_block_indices"] is None


def test_a_block_that_does_not_exist_is_an_error():
    block = type("SingleStreamBlock", (nn.Module,), {})()
    block.linear1 = nn.Linear(4, 28)
    flux = nn.Module()
    flux.single_blocks = nn.ModuleList([block])
    with pytest.raises(UserError, match="block 1 does not exist"):
        lora_flux.create_network(1.0, 4, 1.0, None, [None], flux, train_single_block_indices="0-1")


def test_nothing_selected_is_an_error(unet):
    with pytest.raises(UserError, match="no layer"):
        lora.create_network(1.0, 4, 1.0, None, None, nn.Linear(3, 3))
    with pytest.raises(UserError, match="--network_dim"):
        lora.create_network(1.0, 0, 1.0, None, None, unet)


def test_two_layers_with_one_name_are_an_error():
    unet = nn.Module()
    unet.add_module("a_b", type("Transformer2DModel", (nn.Module,), {})())
    unet.add_module("a", nn.Module())
    unet.a_b.q = nn.Linear(2, 2)
    unet.a.b = type("Transformer2DModel", (nn.Module,), {})()
    unet.a.b.q = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"a_b\.q and a\.b\.q"):
        lora.create_network(1.0, 4, 1.0, None, None, unet)


def test_rank_by_regular_expression_and_by_kind():
    block = type("DoubleStreamBlock", (nn.Module,), {})()
    for stream in ("img", "txt"):
        attention = nn.Module()
        attention.qkv, attention.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        block.add_module(f"{stream}_attn", attention)
    flux = nn.Module()
    flux.double_blocks = nn.ModuleList([block])
    net = lora_flux.create_network(
        1.0, 4, 1.0, None, [None], flux, img_attn_dim="8", txt_attn_dim="0", network_reg_dims="img_attn_proj=2"
    )
    assert {m.lora_name.removeprefix("lora_unet_double_blocks_0_"): m.lora_dim for m in net.loras} == {
        "img_attn_qkv": 8,
        "img_attn_proj": 2,
    }
    assert all(m.scale == 1.0 / m.lora_dim for m in net.loras)


# --- blocks ----------------------------------------------------------------------------------------------------------


def schemes():
    return {"sdxl": lora.TABLE.schemes[0], "sd": lora.TABLE.schemes[1]}


@pytest.mark.parametrize("case", golden_notes()["block_lr_weights"])
def test_block_factors_are_the_recorded_ones(case):
    import json

    facts = json.loads(case)
    arguments = parse_arguments(lora.TABLE.arguments, facts["nw_kwargs"])
    expected = golden_notes()["block_lr_weights"][case]
    found = block_factors(schemes()["sdxl" if facts["is_sdxl"] else "sd"], arguments)
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_sd_block_numbers_are_the_recorded_ones():
    for number, names in golden_notes()["sd15_block_index"].items():
        for name in names:
            for kind in ("resnets", "attentions", "downsamplers", "upsamplers"):
                name = name.replace(f"_{kind}_", f".{kind}.")
            path = name.replace("down_blocks_", "down_blocks.").replace("up_blocks_", "up_blocks.")
            assert unet_block_index(path + ".x") == int(number), name


def test_sdxl_block_numbers():
    assert [sgm_block_index(path) for path in ("input_blocks.0.0", "input_blocks.8.1.proj_in", "middle_block.1.x")] == [
        1,
        9,
        11,
    ]
    assert [sgm_block_index(path) for path in ("output_blocks.8.0.x", "out.2", "time_embed.0")] == [21, 22, 0]


def test_block_dims_of_the_wrong_length(unet):
    with pytest.raises(UserError, match="expected 25 values, not 2"):
        lora.create_network(1.0, 4, 1.0, None, None, unet, block_dims="4,4")


def test_options_without_effect_are_not_silent(unet, caplog):
    plain = type("Transformer2DModel", (nn.Module,), {})()
    plain.to_q = nn.Linear(2, 2)
    with pytest.raises(UserError, match="up_lr_weight: only for a U-Net"):
        lora.create_network(1.0, 4, 1.0, None, None, plain, up_lr_weight="zeros")
    with caplog.at_level("WARNING"):
        lora.create_network(1.0, 4, 1.0, None, None, unet, conv_dim="4")
        lora.create_network(1.0, 4, 1.0, None, None, unet, down_lr_weight="1,1")
    assert "conv_dim=4: has no effect" in caplog.text
    assert "down_lr_weight: has 2 values for 12 blocks" in caplog.text


def test_block_ranks_rates_and_labels(unet):
    dims = ",".join(["0", "8", *["4"] * 23])
    net = create(unet, block_dims=dims, down_lr_weight="1,0.5", up_lr_weight="zeros")
    assert {module.lora_dim for module in net.loras} == {8}
    groups, labels = net.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, None)
    assert labels == ["unet_block1"]
    assert groups[0]["lr"] == pytest.approx(5e-4)
    with pytest.raises(UserError, match="no layer"):
        lora.create_network(1.0, 4, 1.0, None, None, TinyUNet(), down_lr_weight="0,0")


# --- optimizer groups ------------------------------------------------------------------------------------------------


class CLIPMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 4)


def two_encoders():
    encoders = []
    for _ in range(2):
        encoder = nn.Module()
        encoder.text_model = CLIPMLP()
        encoders.append(encoder)
    return encoders


def test_groups_of_two_text_encoders_with_lora_plus(unet):
    encoders = two_encoders()
    net = lora.create_network(1.0, 4, 1.0, None, encoders, unet, loraplus_unet_lr_ratio="4")
    net.apply_to(encoders, unet, True, True)
    groups, labels = net.prepare_optimizer_params_with_multiple_te_lrs([1e-5, 2e-5], 1e-4, 1e-3)
    assert labels == ["textencoder 1", "textencoder 2", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 2e-5, 1e-4, 4e-4])
    assert [len(group["params"]) for group in groups] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "given, expected", [(None, [1e-3] * 2), ([], [1e-3] * 2), (5e-5, [5e-5] * 2), ([7e-5], [7e-5] * 2)]
)
def test_text_encoder_rates_spread(unet, given, expected):
    encoders = two_encoders()
    net = lora.create_network(1.0, 4, 1.0, None, encoders, unet)
    net.apply_to(encoders, unet, True, False)
    groups, _ = net.prepare_optimizer_params_with_multiple_te_lrs(given, 1e-4, 1e-3)
    assert [group["lr"] for group in groups] == pytest.approx(expected)


def test_too_many_text_encoder_rates(unet, network):
    with pytest.raises(UserError, match="--text_encoder_lr"):
        network.prepare_optimizer_params([1e-4, 1e-4], 1e-4, 1e-4)


def test_a_part_without_a_rate_is_frozen(unet):
    encoders = two_encoders()
    net = lora.create_network(1.0, 4, 1.0, None, encoders, unet)
    net.apply_to(encoders, unet, True, True)
    net.prepare_optimizer_params_with_multiple_te_lrs([0.0, 1e-5], 1e-4, None)
    net.prepare_grad_etc(encoders, unet)
    assert len(net.get_trainable_params()) == 2 + 4
    assert not any(p.requires_grad for p in net.text_encoder_loras[0].parameters())


def test_rates_by_regular_expression():
    block = type("SingleStreamBlock", (nn.Module,), {})()
    block.linear1, block.linear2 = nn.Linear(4, 28), nn.Linear(4, 4)
    flux = nn.Module()
    flux.single_blocks = nn.ModuleList([block])
    net = lora_flux.create_network(
        1.0, 4, 1.0, None, [None], flux, network_reg_lrs="nothing=1,linear2$=0.5", loraplus_lr_ratio="2"
    )
    net.apply_to([None], flux, False, True)
    groups, labels = net.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, None)
    assert labels == ["unet", "unet plus", "reg_lr_1", "reg_lr_1 plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 2e-4, 0.5, 1.0])


# --- norms -----------------------------------------------------------------------------------------------------------


def test_max_norm_is_the_recorded_one():
    recorded, expected = golden_tensors("max_norm"), golden_notes()["max_norm_return"]
    bases = {"a": nn.Linear(5, 6), "b": nn.Conv2d(4, 6, 3), "c": nn.Conv2d(4, 6, 1)}
    unet = type("Transformer2DModel", (nn.Module,), {})()
    for name, base in bases.items():
        unet.add_module(name, base)
    root = nn.Module()
    root.add_module("down_blocks", nn.Module())
    weights = {key.removeprefix("before."): value for key, value in recorded.items() if key.startswith("before.")}
    alphas = {key: value for key, value in weights.items() if key.endswith("alpha")}
    net = lora.create_network_from_weights(1.0, None, None, None, unet, weights_sd=weights)[0]
    assert [m.lora_name for m in net.loras] == ["lora_unet_a", "lora_unet_b", "lora_unet_c"]
    assert len(alphas) == 3
    net.apply_to(None, unet, False, True)
    net.load_state_dict(weights)
    assert net.apply_max_norm_regularization(1.0, "cpu") == pytest.approx(tuple(expected), abs=1e-5)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, recorded[f"after.{key}"], rtol=0, atol=1e-5)


def test_max_norm_of_a_split_adapter():
    module = LoRAModule("a", nn.Linear(5, 9), rank=2, split=(2, 3, 4))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert float(module.squared_norm().detach()) == pytest.approx(
        float(module.delta_weight().detach().norm() ** 2), rel=1e-5
    )


def test_norms_are_none_without_ggpo(network):
    network.update_grad_norms()
    network.update_norms()
    assert network.weight_norms() is network.grad_norms() is network.combined_weight_norms() is None


def test_ggpo_norms_are_reported():
    block = type("SingleStreamBlock", (nn.Module,), {})()
    block.linear2 = nn.Linear(4, 4)
    flux = nn.Module()
    flux.single_blocks = nn.ModuleList([block])
    net = lora_flux.create_network(1.0, 4, 1.0, None, [None], flux, ggpo_sigma="0.1", ggpo_beta="0.2")
    net.apply_to([None], flux, False, True)
    randomise(net)
    block.linear2(torch.randn(2, 4)).sum().backward()
    net.update_grad_norms()
    net.update_norms()
    assert net.weight_norms().shape == (1,)
    assert float(net.grad_norms()) > 0
    assert float(net.combined_weight_norms()) > float(net.weight_norms())
    assert "norm" not in "".join(net.state_dict())
    with pytest.raises(UserError, match="together"):
        lora_flux.create_network(1.0, 4, 1.0, None, [None], flux, ggpo_sigma="0.1")


# --- files -----------------------------------------------------------------------------------------------------------


def test_file_round_trip_with_hashes(network, tmp_path):
    file = tmp_path / "deep" / "net.safetensors"
    given = {"ss_network_dim": "4"}
    network.save_weights(str(file), torch.float16, given)
    assert given == {"ss_network_dim": "4"}
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert len(metadata["sshs_model_hash"]) == 64
    assert metadata["sshs_legacy_hash"] == "e3b0c442"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    assert os.listdir(file.parent) == ["net.safetensors"]
    fresh = create(TinyUNet())
    info = fresh.load_weights(str(file))
    assert not info.missing_keys
    assert not info.unexpected_keys
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("extension", ["pt", "ckpt"])
def test_torch_files(network, tmp_path, extension):
    file = tmp_path / f"net.{extension}"
    network.save_weights(str(file), None, None)
    fresh = create(TinyUNet())
    fresh.load_weights(str(file))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_the_scale_follows_the_alpha_of_the_file(unet, network, tmp_path):
    x = torch.randn(2, 8)
    expected = unet(x)
    file = str(tmp_path / "net.safetensors")
    network.save_weights(file, None, None)
    network.restore_forwards()
    other = lora.create_network(1.0, 4, 16.0, None, None, unet)
    other.apply_to(None, unet, False, True)
    other.load_weights(file)
    assert other.loras[0].scale == 0.5
    torch.testing.assert_close(unet(x), expected, rtol=0, atol=1e-6)


def test_a_file_without_alpha_means_alpha_is_the_rank(unet, network, tmp_path):
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("alpha")}
    file = str(tmp_path / "net.safetensors")
    save_file(state, file)
    network.load_weights(file)
    assert network.loras[0].scale == 1.0
    net, _ = lora.create_network_from_weights(1.0, file, None, None, TinyUNet())
    assert net.loras[0].scale == 1.0


def test_another_rank_says_what_to_do(unet, tmp_path):
    file = str(tmp_path / "net.safetensors")
    create(unet).save_weights(file, None, None)
    other = TinyUNet()
    net = lora.create_network(1.0, 8, 1.0, None, None, other)
    net.apply_to(None, other, False, True)
    with pytest.raises(CheckpointError, match=r"rank 4 in the file, 8 here .*--dim_from_weights"):
        net.load_weights(file)


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ["transformer.x.lora_A.weight"],
            "is not an adapter file of this model \\(its first keys: transformer.x.lora_A",
        ),
        ([f"{QUERY}.hada_w1_a"], "another adapter type: .*hada_w1_a"),
        ([f"{QUERY}.lora_down.weight"], "has no lora_up.weight beside it"),
        (["lora_unet_elsewhere.lora_down.weight", "lora_unet_elsewhere.lora_up.weight"], "fits no layer"),
    ],
)
def test_foreign_files_are_refused_by_name(unet, tmp_path, keys, message):
    file = str(tmp_path / "foreign.safetensors")
    save_file({key: torch.zeros(4, 4) for key in keys}, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        lora.create_network_from_weights(1.0, file, None, None, unet)
    assert file in str(caught.value)


def test_missing_and_damaged_files(unet, network, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        network.load_weights(str(tmp_path / "none.safetensors"))
    file = tmp_path / "cut.safetensors"
    network.save_weights(str(file), None, None)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        network.load_weights(str(file))


def test_extra_modules_in_a_file_are_reported_and_left_out(unet, network, tmp_path, caplog):
    state = dict(network.state_dict())
    for suffix in ("lora_down.weight", "lora_up.weight"):
        state[f"lora_unet_down_blocks_9_resnets_0_time_emb_proj.{suffix}"] = torch.zeros(4, 4)
    file = str(tmp_path / "net.safetensors")
    save_file(state, file)
    with caplog.at_level("WARNING"):
        info = network.load_weights(file)
    assert len(info.unexpected_keys) == 2
    assert "2 keys have no place here" in caplog.text


def test_from_weights_takes_ranks_alphas_and_dropouts(tmp_path):
    unet = TinyUNet()
    state = {f"{QUERY}.lora_down.weight": torch.randn(3, 8), f"{QUERY}.lora_up.weight": torch.randn(6, 3)}
    state[f"{QUERY}.alpha"] = torch.tensor(1.5)
    state |= {f"{KEY}.lora_down.weight": torch.randn(5, 8), f"{KEY}.lora_up.weight": torch.randn(6, 5)}
    file = str(tmp_path / "net.safetensors")
    save_file(state, file)
    net, weights = lora.create_network_from_weights(1.0, file, None, None, unet, rank_dropout="0.5", dropout="0.1")
    assert set(weights) == set(state)
    assert {m.lora_name: (m.lora_dim, m.scale) for m in net.loras} == {QUERY: (3, 0.5), KEY: (5, 1.0)}
    assert {(m.rank_dropout, m.dropout) for m in net.loras} == {(0.5, 0.1)}
    net.apply_to(None, unet, False, True)
    net.load_weights(file)
    assert torch.equal(net.state_dict()[f"{KEY}.lora_up.weight"], state[f"{KEY}.lora_up.weight"])
    inference, _ = lora.create_network_from_weights(0.7, file, None, None, unet, for_inference=True, rank_dropout="0.5")
    assert {(m.rank_dropout, m.multiplier) for m in inference.loras} == {(0.0, 0.7)}


def split_flux():
    block = type("DoubleStreamBlock", (nn.Module,), {})()
    block.img_attn = nn.Module()
    block.img_attn.qkv = nn.Linear(4, 12)
    flux = nn.Module()
    flux.double_blocks = nn.ModuleList([block])
    return flux, block.img_attn.qkv


@pytest.mark.parametrize("split", ["true", "false"])
def test_split_files_of_the_reference_keep_the_trained_strength(tmp_path, split):
    """Its files have the parts' alpha beside the fused rank; ours have the alpha that fits the rank."""
    flux, layer = split_flux()
    net = lora_flux.create_network(1.0, 2, 1.0, None, [None], flux, split_qkv="true")
    net.apply_to([None], flux, False, True)
    randomise(net)
    x = torch.randn(3, 4)
    expected = layer(x)
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    metadata = {"ss_network_args": '{"split_qkv": "True"}', "ss_network_alpha": "1.0"}
    net.save_weights(ours, None, metadata)
    state = load_file(ours)
    state["lora_unet_double_blocks_0_img_attn_qkv.alpha"] /= 3
    save_file(state, theirs, metadata)
    net.restore_forwards()
    for file in (ours, theirs):
        again, _ = lora_flux.create_network_from_weights(1.0, file, None, [None], flux, split_qkv=split)
        again.apply_to([None], flux, False, True)
        again.load_weights(file)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
        assert again.loras[0].num_parts == (3 if split == "true" else 1)
        again.restore_forwards()


# --- merging ---------------------------------------------------------------------------------------------------------


def tiny_sd():
    names = {"attentions": "Transformer2DModel", "resnets": "ResnetBlock2D"}
    unet, te = nn.Module(), nn.Module()
    unet.down_blocks = nn.ModuleList([nn.Module()])
    for kind, class_name in names.items():
        unet.down_blocks[0].add_module(kind, nn.ModuleList([type(class_name, (nn.Module,), {})()]))
    attention, resnet = unet.down_blocks[0].attentions[0], unet.down_blocks[0].resnets[0]
    attention.proj_in, attention.attn1 = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
    resnet.conv1, resnet.time_emb_proj = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
    resnet.conv_shortcut = nn.Conv2d(4, 4, 1)
    te.text_model = nn.Module()
    te.text_model.self_attn = type("CLIPAttention", (nn.Module,), {})()
    te.text_model.self_attn.q_proj = nn.Linear(4, 4)
    start = golden_tensors("extract_pair")
    for part, module in (("unet", unet), ("te", te)):
        prefix = f"org.{part}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in start.items() if k.startswith(prefix)})
    return te, unet


def test_merging_base_weights_is_the_recorded_one():
    te, unet = tiny_sd()
    file = GOLDEN / "networks" / "tiny_sd_lora.safetensors"
    net, weights = lora.create_network_from_weights(0.6, str(file), None, te, unet, for_inference=True)
    assert net.is_mergeable()
    net.merge_to(te, unet, weights, torch.float16, "cpu")
    recorded = golden_tensors("base_weights_merge_tiny")
    for part, module in (("unet", unet), ("te", te)):
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, recorded[f"after.{part}.{key}"], rtol=0, atol=1e-6)


def test_a_merged_model_computes_what_the_adapted_one_did():
    te, unet = tiny_sd()
    file = str(GOLDEN / "networks" / "tiny_sd_lora.safetensors")
    resnet, x = unet.down_blocks[0].resnets[0], torch.randn(2, 4, 5, 5)

    def outputs():
        attention = unet.down_blocks[0].attentions[0]
        return [
            resnet.conv1(x),
            resnet.conv_shortcut(x),
            attention.proj_in(x),
            attention.attn1(x[..., :4]),
            te.text_model.self_attn.q_proj(x[..., :4]),
        ]

    net, weights = lora.create_network_from_weights(0.6, file, None, te, unet, for_inference=True)
    net.apply_to(te, unet)
    net.load_state_dict(weights)
    adapted = outputs()
    net.backup_weights()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    net.pre_calculation()
    for got, expected in zip(outputs(), adapted):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    net.restore_weights()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    for got, expected in zip(outputs(), adapted):
        assert torch.equal(got, expected)
    net.restore_forwards()
    net.merge_to(te, unet, weights)
    for got, expected in zip(outputs(), adapted):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_merging_into_packed_weights_is_an_error():
    unet = TinyUNet()
    packed = type("Linear4bit", (nn.Linear,), {})(8, 6)
    unet.block.to_q = packed
    net = lora.create_network(1.0, 4, 1.0, None, None, unet)
    net.apply_to(None, unet, False, True)
    with pytest.raises(UserError, match="quantized"):
        net.merge_to(None, unet, net.state_dict())


def test_lora_files_of_linear_projections_fit_convolutions():
    """SD 2.x: the same key with a 2-D weight in one layout and a 1x1 kernel in the other."""
    module = LoRAModule("a", nn.Conv2d(4, 6, 1), rank=2)
    module.load_state_dict({"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2)})
    assert module.lora_down.weight.shape == (2, 4, 1, 1)
    linear = LoRAModule("a", nn.Linear(4, 6), rank=2)
    linear.load_state_dict({"lora_down.weight": torch.ones(2, 4, 1, 1), "lora_up.weight": torch.ones(6, 2, 1, 1)})
    assert linear.lora_up.weight.shape == (6, 2)


def test_alpha_zero_and_none_mean_the_rank():
    for alpha in (0, None):
        assert LoRAModule("a", nn.Linear(4, 6), rank=2, alpha=alpha).scale == 1.0
    assert math.isclose(LoRAModule("a", nn.Linear(4, 6), rank=3, alpha=1).scale, 1 / 3)


def test_arguments_that_a_table_does_not_know():
    assert Arguments({"a": 1}).get("b", 2) == 2
