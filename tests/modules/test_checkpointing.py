"""Checkpointing from outside: hooks fire once, gradients do not change by a bit."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from library.modules.checkpointing import checkpointed, is_checkpointed, uncheckpointed
from library.modules.published_view import published_view
from networks import lora


class Block(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(size, size), nn.Linear(size, size), nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x, *, gain=1.0):
        self.calls += 1
        return x + self.dropout(self.second(torch.relu(self.first(x)))) * gain


def gradients(module, run, seed=5):
    module.zero_grad()
    torch.manual_seed(seed)
    run().square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def test_hooks_fire_once_and_the_block_runs_twice():
    block = checkpointed(Block())
    fired = []
    block.register_forward_pre_hook(lambda *_: fired.append("before"))
    block.register_forward_hook(lambda *_: fired.append("after"))
    block(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert fired == ["before", "after"]
    assert block.calls == 2


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_with_dropout_are_bit_equal(offload):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 8)
    plain = gradients(block, lambda: block(x, gain=0.5))
    checkpointed(block, offload=offload)
    assert is_checkpointed(block)
    again = gradients(block, lambda: block(x, gain=0.5))
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_offloading_moves_the_inputs_and_nothing_else(monkeypatch):
    moved = []

    class Recorder(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorder)
    block = checkpointed(Block(), offload=True)
    block(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert moved == [(2, 8)]


def test_only_while_training_with_gradients():
    block = checkpointed(Block())
    with torch.no_grad():
        block(torch.randn(2, 8))
    block.eval()
    block(torch.randn(2, 8)).sum().backward()
    assert block.calls == 2
    always = checkpointed(Block().eval(), in_eval=True)
    always(torch.randn(2, 8)).sum().backward()
    assert always.calls == 2


def test_undone_leaves_no_trace():
    block = Block()
    assert uncheckpointed(block) is block
    checkpointed(checkpointed(block))
    uncheckpointed(block)
    assert "forward" not in block.__dict__
    block.forward = own = block.forward
    uncheckpointed(checkpointed(block))
    assert block.__dict__["forward"] == own


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model.requires_grad_(False).train()


def swap_units(unet):
    return [m for m in unet.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")]


def test_adapted_diffusers_blocks(unet):
    """Adapter dropouts of every kind, checkpointing, hooks: bit-equal gradients, one firing per block and forward."""
    view = published_view(unet, "diffusers")
    args = {"rank_dropout": "0.3", "module_dropout": "0.3", "conv_dim": "2"}
    network = lora.create_network(1.0, 4, 2.0, None, None, view, neuron_dropout=0.2, **args)
    network.apply_to(None, view, False, True)
    network.on_epoch_start(None, view)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    inputs = (torch.randn(2, 4, 8, 8), 7, torch.randn(2, 3, 16))
    plain = gradients(network, lambda: unet(*inputs).sample)
    units = swap_units(unet)
    fired = [0] * len(units)
    for index, unit in enumerate(units):
        checkpointed(unit)

        def count(*_, index=index):
            fired[index] += 1

        unit.register_forward_hook(count)
    recomputed = gradients(network, lambda: unet(*inputs).sample)
    other = gradients(network, lambda: unet(*inputs).sample, seed=6)
    for unit in units:
        uncheckpointed(unit)
    network.restore_forwards()
    assert fired == [2] * len(units)
    assert len(units) > 8
    assert len(plain) == len(recomputed) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))
    assert len(other) != len(plain) or any(not torch.equal(a, b) for a, b in zip(plain, other))
