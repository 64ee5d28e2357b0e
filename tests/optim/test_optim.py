"""Schedules, optimizers by name, the driver."""

import pytest
import torch
from torch import nn

from library.base.errors import UserError
from library.optim.driver import OptimizerDriver
from library.optim.registry import build_optimizer, parse_arguments
from library.optim.schedulers import Schedule, build_schedule
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 1.0, 99: 1.0}),
        ("constant_with_warmup", {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine", {0: 0.0, 10: 1.0, 55: 0.5, 100: 0.0}),
    ],
)
def test_curves(name, values):
    schedule = Schedule(name, 0 if name == "constant" else 10, 100)
    assert {step: schedule.factor(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_curves_are_transformers(name):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=50)
    ours = Schedule(name, 7, 50)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours.factor(step), abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warmup_as_a_share():
    assert build_schedule(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=0.1), 50).warmup == 5
    assert build_schedule(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=3), 50).warmup == 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "use constant_with_warmup"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 500}, "longer than the run"),
        ({"lr_scheduler": "cosin"}, "did you mean cosine"),
    ],
)
def test_schedules_that_cannot_be(values, text):
    with pytest.raises(UserError, match=text):
        build_schedule(ScheduleOptions(**values), 50)


def test_arguments_are_literals():
    pairs = ["betas=0.9,0.99", "weight_decay=0.1", "mode='x=y'", "on=True"]
    assert parse_arguments(pairs, "--x") == {"betas": (0.9, 0.99), "weight_decay": 0.1, "mode": "x=y", "on": True}
    with pytest.raises(UserError, match="must be a Python literal"):
        parse_arguments(["a=word"], "--x")


def groups():
    return [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5}, {"params": [nn.Parameter(torch.ones(2))]}]


def test_optimizer_by_name():
    built = build_optimizer(
        OptimizerOptions(optimizer_type="adamw", learning_rate=0.1, optimizer_args=["eps=1e-7"]), groups()
    )
    assert [group["lr"] for group in built.optimizer.param_groups] == [0.5, 0.1]
    assert built.description == "torch.optim.adamw.AdamW(eps=1e-07)"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"optimizer_type": "AdamWW"}, "did you mean AdamW?"),
        ({"optimizer_args": ["nonsense=1"]}, "does not take these"),
    ],
)
def test_optimizers_that_cannot_be(values, text):
    with pytest.raises(UserError, match=text.replace("?", r"\?")):
        build_optimizer(OptimizerOptions(learning_rate=0.1, **values), groups())


def driver(scaler=None, **options):
    parameter = nn.Parameter(torch.ones(4))
    built = build_optimizer(OptimizerOptions(learning_rate=0.1, **options), [{"params": [parameter]}])
    return parameter, OptimizerDriver(
        built, Schedule("linear", 0, 10), [parameter], max_grad_norm=1.0, scaler=scaler, names=["unet"]
    )


def test_driver_clips_and_follows_the_schedule():
    parameter, drive = driver()
    drive.backward((parameter * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum())
    assert float(drive.clip()) == pytest.approx(5.0)
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert drive.learning_rates() == {"unet": 0.1}
    assert drive.step()
    assert drive.learning_rates() == {"unet": pytest.approx(0.09)}
    assert parameter.grad is None


def test_a_step_the_scaler_skips_advances_nothing():
    parameter, drive = driver(torch.amp.GradScaler("cpu", init_scale=8.0))
    drive.backward(parameter.sum() * float("inf"))
    drive.clip()
    assert not drive.step()
    assert drive.step_count == 0 and drive.learning_rates() == {"unet": 0.1}
    assert parameter.tolist() == [1.0] * 4
    drive.backward(parameter.sum())
    assert float(drive.clip()) == pytest.approx(2.0)
    assert drive.step() and drive.step_count == 1
    assert parameter.tolist() != [1.0] * 4


def test_the_loss_scaler_and_a_rate_set_by_hand_go_on():
    """What fp16 has learned about its scale belongs to the state."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter, first = driver(scaler)
    first.set_rate(0.25)
    for value in (1.0, float("inf"), 1.0):
        first.backward((parameter * value).sum())
        first.clip()
        first.step()
    state = first.state()
    fresh = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, second = driver(fresh)
    second.load_state(state, 2)
    assert fresh.get_scale() == scaler.get_scale() == 512.0
    assert second.step_count == 2
    assert second.learning_rates() == first.learning_rates() == {"unet": pytest.approx(0.25 * 0.8)}


def test_arguments_of_the_new_run_count_after_a_state_is_loaded():
    _, first = driver(optimizer_args=["weight_decay=0.5", "eps=1e-6"])
    _, second = driver(optimizer_args=["weight_decay=0.25"])
    second.load_state(first.state(), 3)
    (group,) = second.optimizer.param_groups
    assert (group["weight_decay"], group["eps"]) == (0.25, 1e-6)
    assert second.learning_rates() == {"unet": pytest.approx(0.07)}
