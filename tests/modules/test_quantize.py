"""Weights kept in 8 bits."""

import pytest
import torch
from torch import nn

from library.modules.components import Need
from library.modules.loading import load_module
from library.modules.quantize import FORMAT, is_fp8, prepare_fp8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.wo, self.norm = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
            nn.LayerNorm(8),
        )

    def forward(self, x):
        return self.wo(torch.relu(self.linear(self.norm(self.conv(x).flatten(2).transpose(1, 2)))))


def stored(weights, tmp_path, dtype=torch.bfloat16, skip=()):
    return load_module(
        Block,
        {name: (lambda value=value: value) for name, value in weights.items()},
        path=tmp_path,
        part="block",
        dtype=dtype,
        prepare=lambda module: prepare_fp8([module], skip),
    )


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def test_weights_take_a_byte_each_and_stay_close(wide, tmp_path):
    narrow = stored(wide.state_dict(), tmp_path, torch.float32)
    for name in ("conv", "linear", "wo"):
        assert narrow.get_submodule(name).weight.dtype == FORMAT and type(narrow.get_submodule(name)) is type(
            wide.get_submodule(name)
        )
    assert narrow.norm.weight.dtype == torch.float32
    x, y = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6)
    y = x.detach().clone().requires_grad_()
    theirs, ours = wide(x), narrow(y)
    assert (theirs - ours).norm() < 0.05 * theirs.norm()
    theirs.square().sum().backward()
    ours.square().sum().backward()
    assert (x.grad - y.grad).norm() < 0.15 * x.grad.norm()


def test_gradients_are_those_of_the_widened_weights(wide, tmp_path):
    """What the backward computes with is exactly what the forward computed with."""
    narrow = stored(wide.state_dict(), tmp_path, torch.float32)
    with torch.no_grad():
        for name in ("conv", "linear", "wo"):
            layer = narrow.get_submodule(name)
            wide.get_submodule(name).weight.copy_(layer.weight.float() * layer.weight_scale)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    wide(x).square().sum().backward()
    narrow(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5)


def test_only_the_small_weights_are_kept_for_the_backward(wide, tmp_path):
    narrow, kept = stored(wide.state_dict(), tmp_path, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        narrow(torch.randn(1, 4, 6, 6, requires_grad=True))
    shapes = {tuple(t.shape) for t in kept if t.dtype != FORMAT}
    assert (8, 4, 3, 3) not in shapes and sum(t.dtype == FORMAT for t in kept) == 3


def test_weights_of_this_format_are_taken_as_they_are(wide, tmp_path):
    weights = wide.state_dict()
    weights["linear.weight"] = weights["linear.weight"].to(FORMAT)
    layer = stored(weights, tmp_path).linear
    assert torch.equal(layer.weight.view(torch.uint8), weights["linear.weight"].view(torch.uint8))
    assert torch.equal(layer.weight_scale, torch.ones(8, 1))


def test_layers_can_be_left_out_and_a_whole_model_moves(wide, tmp_path):
    narrow = stored(wide.state_dict(), tmp_path, skip=("wo",))
    assert not is_fp8(narrow.wo) and narrow.wo.weight.dtype == torch.bfloat16
    assert narrow.to("cpu").linear.weight.dtype == FORMAT
    assert set(narrow.state_dict()) == set(wide.state_dict())


def test_under_autocast_it_computes_in_its_format(wide, tmp_path):
    narrow = stored(wide.state_dict(), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(torch.randn(1, 4, 6, 6)).dtype == torch.bfloat16


def test_nothing_is_prepared_without_being_asked():
    assert Need().prepare_denoiser is None and Need().prepare_text_encoder is None
