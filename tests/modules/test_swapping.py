"""Blocks that wait in main memory: what they compute, and what of them is on the device."""

import pytest
import torch
from torch import nn

from library.base.errors import UserError
from library.modules.checkpointing import checkpointed
from library.modules.quantize import prepare_fp8, put_fp8
from library.modules.swapping import BlockSwapper


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, size), nn.Linear(size, 8)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Adapter(nn.Module):
    """Trained beside a frozen layer."""

    def __init__(self, layer):
        super().__init__()
        self.inner = [layer.forward]
        self.change = nn.Linear(layer.in_features, layer.out_features, bias=False)
        layer.forward = self.forward

    def forward(self, x):
        return self.inner[0](x) + self.change(x)


def model(count=5):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(8 + 4 * n) for n in range(count)).requires_grad_(False)
    return blocks, [Adapter(block.first) for block in blocks]


def results(blocks, adapters, steps=3):
    found = []
    for step in range(steps):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(step))
        for block in blocks:
            x = block(x)
        x.square().sum().backward()
        found += [x.detach(), *(adapter.change.weight.grad.clone() for adapter in adapters)]
        for adapter in adapters:
            adapter.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_swapped_blocks_compute_the_same(count, recompute):
    plain, swapped = model(), model()
    for block in (*plain[0], *swapped[0]) if recompute else ():
        checkpointed(block, in_eval=True)
    BlockSwapper(swapped[0], count, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(results(*plain), results(*swapped), strict=True))


def test_two_blocks_at_most_are_on_the_device():
    blocks, adapters = model()
    swapper = BlockSwapper(blocks, 4, torch.device("cpu"))
    assert [sum(p.numel() for p in block.parameters()) > 0 for block in blocks] == [True] + [False] * 4
    results(blocks, adapters)
    assert len(swapper.slots) == 2 and sum(block.slot is not None for block in swapper.blocks) == 2
    largest = max(block.master.numel() for block in swapper.blocks)
    assert all(slot.numel() == largest for slot in swapper.slots)


def test_weights_are_not_kept_for_the_backward():
    """Without recomputation too: they would be overwritten by the blocks that follow."""
    blocks, _ = model()
    swapper = BlockSwapper(blocks, 5, torch.device("cpu"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(1, 8, requires_grad=True)
        for block in blocks:
            x = block(x)
    storages = {slot.untyped_storage().data_ptr() for slot in swapper.slots}
    assert not [t for t in kept if t.untyped_storage().data_ptr() in storages]


def test_looking_without_gradients_and_errors_leave_nothing_behind():
    blocks, adapters = model()
    expected = results(*model())
    swapper = BlockSwapper(blocks, 3, torch.device("cpu"))
    with torch.no_grad():
        for block in blocks:
            block(torch.randn(1, 8))
    with pytest.raises(RuntimeError):
        blocks[4](torch.randn(1, 7))
    assert not any(block.entered for block in swapper.blocks)
    assert all(torch.equal(a, b) for a, b in zip(expected, results(blocks, adapters), strict=True))


def test_eight_bit_weights_are_swapped_too():
    def narrow():
        blocks, _ = model()
        weights = [
            {n: m.weight.detach().clone() for n, m in b.named_modules() if isinstance(m, nn.Linear)} for b in blocks
        ]
        plain = nn.ModuleList(Block(8 + 4 * n) for n in range(5)).requires_grad_(False)
        for block, tensors in zip(plain, weights):
            nn.init.zeros_(block.first.bias)
            nn.init.zeros_(block.second.bias)
            prepare_fp8([block])
            for name in ("first", "second"):
                put_fp8(block.get_submodule(name), tensors[name], "cpu")
        return plain

    x = torch.randn(1, 8)
    plain, swapped = narrow(), narrow()
    BlockSwapper(swapped, 4, torch.device("cpu"))
    assert torch.equal(nn.Sequential(*plain)(x), nn.Sequential(*swapped)(x))


def test_what_cannot_be_swapped():
    blocks, _ = model()
    with pytest.raises(UserError, match="--blocks_to_swap = 6: this model has 5 blocks"):
        BlockSwapper(blocks, 6, torch.device("cpu"))
    blocks.requires_grad_(True)
    with pytest.raises(UserError, match="frozen"):
        BlockSwapper(blocks, 1, torch.device("cpu"))
