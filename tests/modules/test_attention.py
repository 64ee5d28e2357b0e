"""Attention back ends."""

import sys

import pytest
import torch
from torch import nn

from library.base.errors import UserError
from library.modules.attention import BACK_ENDS, attend, attend_by_item, check_back_end, use_attention


@pytest.mark.parametrize("mask", [None, (1, 1, 1, 7), (3, 1, 1, 7), (3, 1, 5, 7), (3, 2, 5, 7)])
def test_by_item_is_the_same(mask):
    q, k, v = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    if mask is not None:
        mask = torch.rand(mask) > 0.4
        mask[..., 0] = True
    assert torch.allclose(attend_by_item(q, k, v, mask=mask), attend(q, k, v, mask=mask), atol=1e-6)


@pytest.mark.parametrize(("name", "package"), [("xformers", "xformers.ops"), ("flash", "flash_attn")])
def test_missing_packages_are_named_before_anything_loads(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install"):
        check_back_end(f"--{name}", name)


def test_what_cannot_train_says_so():
    with pytest.raises(UserError, match="no gradients"):
        check_back_end("--attn_mode", "sageattn")
    check_back_end("--mem_eff_attn", "mem_eff_attn")


def test_every_part_of_a_model_is_switched():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = attend

    model = nn.Sequential(Part(), nn.Sequential(Part()))
    use_attention(model, "mem_eff_attn")
    assert [part.attend for part in model.modules() if isinstance(part, Part)] == [attend_by_item] * 2
    use_attention(model, "torch")
    assert model[0].attend is BACK_ENDS["torch"][0]
