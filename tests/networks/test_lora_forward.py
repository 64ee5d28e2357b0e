"""Numbers of adapters against values recorded from the reference, and what applying and removing does."""

import pytest
import torch
from adapter_models import TinyUNet, golden_tensors, randomise
from torch import nn

from library.base.errors import UserError
from networks import lora, lora_flux
from networks.engine.modules import AdapterSettings, GgpoLoRAModule, LoRAModule


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def conv(weight, bias, **options):
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **options)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def adapted(base, rank, alpha, down, up, **settings):
    module = LoRAModule("a", base, rank=rank, alpha=alpha, settings=AdapterSettings(**settings))
    module.load_state_dict({"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))})
    module.apply_to()
    return module


@pytest.fixture
def recorded():
    return golden_tensors("lora_forward")


def lin(recorded, multiplier=1.0, **settings):
    base = linear(recorded["lin_w"], recorded["lin_b"])
    alpha = float(recorded["lin_alpha"])
    return base, adapted(base, 4, alpha, recorded["lin_down"], recorded["lin_up"], multiplier=multiplier, **settings)


def test_linear(recorded):
    base, _ = lin(recorded, multiplier=0.8)
    torch.testing.assert_close(base(recorded["lin_x"]), recorded["lin_y"], rtol=0, atol=1e-6)


def test_convolution(recorded):
    base = conv(recorded["c3_w"], recorded["c3_b"], stride=2, padding=1)
    adapted(base, 4, 2.0, recorded["c3_down"], recorded["c3_up"], multiplier=0.8)
    torch.testing.assert_close(base(recorded["c3_x"]), recorded["c3_y"], rtol=0, atol=1e-6)


def test_dropout_then_rank_dropout_draw_in_the_recorded_order(recorded):
    base, adapter = lin(recorded, dropout=0.25, rank_dropout=0.5)
    adapter.train()
    torch.manual_seed(7)
    torch.testing.assert_close(base(recorded["lin_x"]), recorded["drop_y_seed7"], rtol=0, atol=1e-6)


def test_module_dropout_draws_once_per_call(recorded):
    base, adapter = lin(recorded, module_dropout=0.5)
    adapter.train()
    torch.manual_seed(7)
    outputs = torch.stack([base(recorded["lin_x"]) for _ in range(4)])
    torch.testing.assert_close(outputs, recorded["moddrop_y_seed7"], rtol=0, atol=1e-6)


def test_no_dropout_in_eval_mode(recorded):
    base, adapter = lin(recorded, 0.8, dropout=0.9, rank_dropout=0.9, module_dropout=0.9)
    adapter.eval()
    torch.testing.assert_close(base(recorded["lin_x"]), recorded["lin_y"], rtol=0, atol=1e-6)


def test_initial_weights_are_the_recorded_ones():
    recorded = golden_tensors("init")
    torch.manual_seed(0)
    module = LoRAModule("a", nn.Linear(8, 6), rank=4)
    assert torch.equal(module.lora_down.weight, recorded["lora_down_seed0_after_linear_8_6"])
    assert not module.lora_up.weight.any()
    torch.manual_seed(0)
    module = LoRAModule("a", nn.Linear(8, 9), rank=4, split=(2, 3, 4))
    for part in range(3):
        expected = recorded[f"lora_flux_split_down{part}_seed0_after_linear_8_9"]
        assert torch.equal(module.lora_down[part].weight, expected)


def split_module(recorded):
    base = linear(recorded["w"], recorded["b"])
    module = LoRAModule("a", base, rank=2, alpha=1.0, split=(2, 3, 4))
    for part in range(3):
        module.lora_down[part].weight.data.copy_(recorded[f"down{part}"])
        module.lora_up[part].weight.data.copy_(recorded[f"up{part}"])
    return base, module


def test_split_forward():
    recorded = golden_tensors("lora_flux_split_forward")
    base, module = split_module(recorded)
    module.apply_to()
    torch.testing.assert_close(base(recorded["x"]), recorded["y"], rtol=0, atol=1e-6)


def test_a_split_file_has_the_trained_strength():
    """A reader that knows nothing of the split computes alpha / rank * up @ down."""
    recorded = golden_tensors("lora_flux_split_forward")
    _, module = split_module(recorded)
    state = module.state_dict()
    rank = state["lora_down.weight"].shape[0]
    change = state["alpha"] / rank * (state["lora_up.weight"] @ state["lora_down.weight"])
    y = nn.functional.linear(recorded["x"], recorded["w"] + change, recorded["b"])
    torch.testing.assert_close(y, recorded["y"], rtol=0, atol=1e-6)
    torch.testing.assert_close(module.delta_weight(), change, rtol=0, atol=1e-6)


def test_split_state_is_fused_as_recorded():
    recorded = golden_tensors("split_qkv_state_dict")
    for name, parts in (
        ("lora_unet_double_blocks_0_img_attn_qkv", (4, 4, 4)),
        ("lora_unet_single_blocks_0_linear1", (4, 4, 4, 8)),
    ):
        module = LoRAModule(name, nn.Linear(5, sum(parts)), rank=2, alpha=1.0, split=parts)
        raw = {
            key.removeprefix(f"raw.{name}."): value for key, value in recorded.items() if key.startswith(f"raw.{name}")
        }
        module.load_state_dict(raw)
        saved = {
            key.removeprefix(f"saved.{name}."): v for key, v in recorded.items() if key.startswith(f"saved.{name}")
        }
        state = module.state_dict()
        assert set(state) == set(saved)
        for key in ("lora_down.weight", "lora_up.weight"):
            assert torch.equal(state[key], saved[key])
        assert float(state["alpha"]) == len(parts) * float(saved["alpha"])
        again = LoRAModule(name, nn.Linear(5, sum(parts)), rank=2, alpha=7.0, split=parts)
        again.load_state_dict(state)
        assert again.scale == module.scale
        for (down, up), (old_down, old_up) in zip(again.factors(), module.factors()):
            assert torch.equal(down.weight, old_down.weight)
            assert torch.equal(up.weight, old_up.weight)


def test_a_file_without_split_does_not_fit_a_split_adapter():
    module = LoRAModule("a", nn.Linear(5, 12), rank=2, split=(4, 4, 4))
    with pytest.raises(UserError, match="split_qkv"):
        module.load_state_dict({"lora_down.weight": torch.ones(6, 5), "lora_up.weight": torch.ones(12, 6)})


def ggpo_module(recorded):
    base = linear(recorded["w"], recorded["b"])
    settings = AdapterSettings(ggpo_sigma=0.03, ggpo_beta=0.01)
    module = GgpoLoRAModule("a", base, rank=2, alpha=1.0, settings=settings)
    state = {"lora_down.weight": recorded["down"], "lora_up.weight": recorded["up"], "alpha": torch.tensor(1.0)}
    module.load_state_dict(state)
    module.lora_down.weight.grad = recorded["down_grad"].clone()
    module.lora_up.weight.grad = recorded["up_grad"].clone()
    module.apply_to()
    return base, module


def test_ggpo_statistics():
    """As recorded, but for alpha / r = 0.5, which the reference forgets in the weight's norm."""
    recorded = golden_tensors("ggpo")
    _, module = ggpo_module(recorded)
    torch.testing.assert_close(module.org_weight_norm, recorded["w"].norm(dim=1).mean())
    module.org_weight_norm.copy_(recorded["norm_est"])  # recorded before the recorded weight was put in
    module.update_norms()
    expected = 0.5 * recorded["weight_norms"]
    torch.testing.assert_close(module.weight_norms, expected, rtol=1e-5, atol=1e-6)
    combined = (recorded["norm_est"] ** 2 + expected**2).sqrt()
    torch.testing.assert_close(module.combined_norms, combined, rtol=1e-5, atol=1e-6)
    module.update_grad_norms()
    torch.testing.assert_close(module.grad_norms, recorded["grad_norms"], rtol=2e-2, atol=0)


def test_ggpo_forward():
    recorded = golden_tensors("ggpo")
    base, module = ggpo_module(recorded)
    module.combined_norms.copy_(recorded["combined_weight_norms"])
    module.grad_norms.copy_(recorded["grad_norms"])
    torch.manual_seed(9)
    torch.testing.assert_close(base(recorded["x"]), recorded["y_seed9"], rtol=0, atol=2e-5)
    module.eval()
    quiet = base(recorded["x"])
    assert torch.equal(quiet, base(recorded["x"]))
    change = recorded["w"] + 0.5 * recorded["up"] @ recorded["down"]
    torch.testing.assert_close(quiet, nn.functional.linear(recorded["x"], change, recorded["b"]))


def test_applying_and_removing_leaves_the_forward_bit_equal(unet):
    x = torch.randn(2, 8)
    before = unet(x)
    first = lora.create_network(1.0, 4, 1.0, None, None, unet)
    second = lora.create_network(0.5, 2, 1.0, None, None, unet)
    for net in (first, second):
        net.apply_to(None, unet, False, True)
        randomise(net)
    assert not torch.equal(before, unet(x))
    with pytest.raises(RuntimeError, match="replaced again"):
        first.restore_forwards()
    second.restore_forwards()
    first.restore_forwards()
    assert torch.equal(before, unet(x))
    assert "forward" not in unet.block.to_q.__dict__


def test_a_fresh_adapter_changes_nothing(unet):
    x = torch.randn(2, 8)
    before = unet(x)
    lora.create_network(1.0, 4, 1.0, None, None, unet).apply_to(None, unet, False, True)
    assert torch.equal(before, unet(x))


def test_hooks_of_the_base_layer_fire_once(unet, network):
    calls = []
    unet.block.to_q.register_forward_pre_hook(lambda *_: calls.append("before"))
    unet.block.to_q.register_forward_hook(lambda *_: calls.append("after"))
    unet(torch.randn(2, 8))
    assert calls == ["before", "after"]


def test_the_base_weight_is_never_read():
    """A layer whose weight cannot be used, like a packed one, still takes an adapter."""

    class QuantizedLinear(nn.Module):
        in_features, out_features = 8, 6

        def __init__(self):
            super().__init__()
            self.packed = nn.Buffer(torch.zeros(12, dtype=torch.uint8))

        @property
        def weight(self):
            raise AssertionError("read")

        def forward(self, x):
            return x[..., :6]

    unet = TinyUNet()
    unet.block.to_q = QuantizedLinear()
    net = lora.create_network(1.0, 4, 1.0, None, None, unet)
    net.apply_to(None, unet, False, True)
    randomise(net)
    x = torch.randn(2, 8)
    unet(x).sum().backward()
    assert len(net.loras) == 2
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_half_precision_model_with_float_adapter(unet):
    net = lora.create_network(1.0, 4, 1.0, None, None, unet.to(torch.bfloat16))
    net.apply_to(None, unet, False, True)
    randomise(net)
    y = unet(torch.randn(2, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert unet(torch.randn(2, 8)).dtype == torch.bfloat16


def test_a_strength_per_sample(unet, network):
    x = torch.randn(2, 3, 8)
    network.set_multiplier(torch.tensor([0.25, 2.0]))
    both = unet(x)
    for index, strength in enumerate((0.25, 2.0)):
        network.set_multiplier(strength)
        torch.testing.assert_close(both[index], unet(x)[index])
    network.set_multiplier(0.0)
    off = unet(x)
    network.restore_forwards()
    assert torch.equal(off, unet(x))


def test_flux_module_trains_t5_only_on_request():
    from adapter_models import clip_encoder, t5_encoder

    encoders = [None, t5_encoder(32, 64, 1, 2)]
    block = type("DoubleStreamBlock", (nn.Module,), {})()
    block.img_attn = nn.Module()
    block.img_attn.qkv = nn.Linear(4, 12)
    flux = nn.Module()
    flux.double_blocks = nn.ModuleList([block])
    assert lora_flux.create_network(1.0, 4, 1.0, None, encoders, flux).train_t5xxl is False
    net = lora_flux.create_network(1.0, 4, 1.0, None, encoders, flux, train_t5xxl="yes")
    assert net.train_t5xxl is True
    assert len(net.text_encoder_loras) == 7
    assert len(lora_flux.create_network(1.0, 4, 1.0, None, [clip_encoder(), None], flux).text_encoder_loras) == 12
