"""Updates during the backward pass: the same as after it, gradient by gradient."""

import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training
from test_optimizers import Training, equal

from library.base.errors import UserError
from library.base.safetensors_io import load_file
from library.optim.fused import check_fused, round_stochastically
from library.options.optimizer import OptimizerOptions

RELATIVE: list[str] = []
MANUAL = ["relative_step=False", "scale_parameter=False", "weight_decay=0.01"]


def given(fused, arguments):
    return OptimizerOptions(
        optimizer_type="Adafactor", learning_rate=0.01, optimizer_args=arguments, fused_backward_pass=fused
    )


@pytest.mark.parametrize("arguments", [RELATIVE, MANUAL, ["beta1=0.9"]])
def test_equal_to_unfused(arguments, tmp_path):
    plain = Training(given(False, arguments), max_grad_norm=0.0, second=0.5).go(0, 6)
    fused = Training(given(True, arguments), second=0.5).go(0, 3)
    resumed = Training(given(True, arguments), second=0.5).load(fused.save(tmp_path / "a-state", 3), 3).go(3, 6)
    assert equal(fused.go(3, 6).values(), plain.values())
    assert equal(resumed.values(), plain.values())


def test_gradients_go_at_once_and_their_norm_is_known():
    plain, fused = Training(given(False, MANUAL), max_grad_norm=0.0), Training(given(True, MANUAL))
    held = []
    fused.weights[0].register_post_accumulate_grad_hook(lambda p: held.append(p.grad))
    for training in (plain, fused):
        training.drive.backward(sum((w**2).sum() for w in training.weights))
    assert held == [None] and all(w.grad is None for w in fused.weights)
    assert float(fused.drive.clip()) == pytest.approx(float(plain.drive.clip()))
    assert float(fused.drive.clip()) == 0.0
    assert fused.drive.step() and fused.drive.step_count == 1


def test_a_loss_without_numbers_changes_nothing():
    training = Training(given(True, RELATIVE)).go(0, 1)
    before = training.values()
    training.drive.backward(sum(w.sum() for w in training.weights) * float("nan"))
    assert not torch.isfinite(training.drive.clip())
    training.drive.skip()
    assert equal(training.values(), before) and training.drive.step_count == 2
    assert not equal(training.go(1, 2).values(), before)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_a_gradient_without_numbers_leaves_its_weight_alone():
    training = Training(given(True, RELATIVE)).go(0, 1)
    before = training.values()
    first, second = training.weights
    training.drive.backward(_BadGradient.apply(first).sum() + second.sum())
    assert not torch.isfinite(training.drive.clip())
    assert torch.equal(first, before[0]) and not torch.equal(second, before[1])


def test_rounding_keeps_the_mean_and_repeats():
    values = torch.full((20000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    torch.manual_seed(1)
    rounded = round_stochastically(values)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.float().mean() == pytest.approx(1.0 + 2**-10, abs=1e-4)
    torch.manual_seed(1)
    assert torch.equal(round_stochastically(values), rounded)
    exact = torch.tensor([1.5, -2.0, 0.0, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert torch.isnan(round_stochastically(torch.tensor([float("nan")]))).all()


def test_small_updates_of_bfloat16_add_up():
    """Rounded to the nearest they would be lost one by one."""
    small = [*MANUAL[:2], "clip_threshold=0.1"]  # steps of 0.001, far below the distance between two numbers
    runs = [Training(given(fused, small), dtype=torch.bfloat16, max_grad_norm=0.0) for fused in (True, True, False)]
    exact = Training(given(False, small), max_grad_norm=0.0)
    start = exact.values()
    fused, again, nearest, exact = (one.go(0, 20).values() for one in (*runs, exact))
    assert equal(again, fused)

    def reached(values):
        """Part of the way that was to go."""
        pairs = [(v.float() - s, e - s) for v, e, s in zip(values, exact, start)]
        return sum(float((m * w).sum()) for m, w in pairs) / sum(float((w * w).sum()) for _, w in pairs)

    assert reached(fused) == pytest.approx(1.0, abs=0.1)
    assert reached(nearest) < 0.8
    assert set(runs[0].drive.optimizer.state) == set(runs[0].weights)  # nothing of the copies stays


def test_where_it_cannot_be():
    check_fused(1, half=False)
    with pytest.raises(UserError, match="works with one process"):
        check_fused(2, half=False)
    with pytest.raises(UserError, match="use bf16"):
        check_fused(1, half=True)


def test_a_whole_run_is_the_same(inputs, tmp_path):
    outcomes = {}
    for name, more in {"plain": ("--max_grad_norm", "0"), "fused": ("--fused_backward_pass",)}.items():
        folder = tmp_path / name
        folder.mkdir()
        arguments = network_arguments("sd", inputs, folder, dataset_toml(folder, inputs), *more)
        outcome = run_training("sd", [*arguments, "--optimizer_type", "Adafactor"])
        norms = [event["norm/grad"] for event in events(folder / "out") if event["event"] == "step"]
        outcomes[name] = outcome.losses, norms, load_file(folder / "out" / "last.safetensors")
    (losses, norms, tensors), fused = outcomes["plain"], outcomes["fused"]
    assert fused[0] == losses and fused[1] == pytest.approx(norms, rel=1e-5)
    assert all(torch.equal(fused[2][name], tensors[name]) for name in tensors)
