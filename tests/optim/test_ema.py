"""The average of trained weights."""

import pytest
import torch
from torch import nn

from library.optim.ema import AveragedWeights


def moving(decay, warmup, steps=5):
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))]
    average = AveragedWeights(weights, decay=decay, device=torch.device("cpu"), warmup=warmup)
    for _ in range(steps):
        with torch.no_grad():
            for one in weights:
                one.add_(1)
        average.update()
    return weights, average


def by_hand(decay, warmup, steps=5):
    value = 0.0
    for n in range(1, steps + 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        value = d * value + (1 - d) * n
    return value


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.1, 0.9])
def test_formula(decay, warmup):
    _, average = moving(decay, warmup)
    assert average.average[0].tolist() == pytest.approx([by_hand(decay, warmup)] * 3)
    assert all(one.dtype == torch.float32 for one in average.average)


def test_weights_come_back_bit_for_bit():
    weights, average = moving(0.9, True)
    before = [one.detach().clone() for one in weights]
    with pytest.raises(RuntimeError), average.applied():
        assert torch.equal(weights[0], average.average[0])
        raise RuntimeError
    assert all(torch.equal(one, old) for one, old in zip(weights, before))


def test_state_goes_on_where_it_was():
    _, straight = moving(0.9, True, steps=5)
    weights, first = moving(0.9, True, steps=3)
    again = AveragedWeights(weights, decay=0.9, device=torch.device("cpu"))
    again.load_state({"count": first.count, "average": [one.clone() for one in first.average]})
    for _ in range(2):
        with torch.no_grad():
            for one in weights:
                one.add_(1)
        again.update()
    assert torch.equal(again.average[0], straight.average[0])
    with pytest.raises(ValueError, match="other parameters"):
        again.load_state({"count": 1, "average": [torch.zeros(1)]})
