"""Small changes of weights in bfloat16."""

import pytest
import torch
from torch import nn

from library.optim.rounding import WideUpdates, round_stochastically


def trained(kind, steps=200, rate=1e-4, dtype=torch.bfloat16):
    """A thousand weights of 1 that are pushed down by `rate` in every step; a bfloat16 below 1 is 1/256 away."""
    weight = nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=rate)
    wide = WideUpdates([weight], kind, seed=3) if kind else None
    memory = weight.data_ptr()
    for step in range(steps):
        weight.grad = torch.ones_like(weight)
        if wide is None:
            optimizer.step()
            continue
        with wide.widened(step):
            optimizer.step()
        assert weight.dtype == dtype and weight.data_ptr() == memory
    return weight.detach().float(), wide


def test_rounding_to_nearest_loses_everything():
    assert trained(None)[0].tolist() == [1.0] * 1000


@pytest.mark.parametrize("kind", ["stochastic", "kahan"])
def test_small_changes_arrive(kind):
    weight, _ = trained(kind)
    assert float(weight.mean()) == pytest.approx(0.98, abs=1.5e-3)


def test_kept_remainders_make_a_finer_number():
    weight, wide = trained("kahan")
    assert (weight + wide.remainders[0].float()).tolist() == pytest.approx([0.98] * 1000, abs=1e-3)
    again = WideUpdates(wide.parameters, "kahan", seed=3)
    again.load_state({"remainders": [one.clone() for one in wide.remainders]})
    assert torch.equal(again.remainders[0], wide.remainders[0])


def test_rounding_by_chance_is_right_on_average_and_repeatable():
    values = torch.full((20_000,), 1 + 1 / 512)
    rounded = round_stochastically(values, torch.Generator().manual_seed(1)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert float(rounded.mean()) == pytest.approx(1 + 1 / 512, abs=2e-4)
    assert torch.equal(trained("stochastic")[0], trained("stochastic")[0])
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    assert torch.equal(round_stochastically(odd).float().nan_to_num(7), odd.nan_to_num(7))


def test_weights_in_other_formats_are_left_alone():
    weight, wide = trained("kahan", dtype=torch.float32)
    assert wide.parameters == [] and float(weight.mean()) == pytest.approx(0.98, abs=1e-4)
