"""Every schedule: the recorded curves, classes of one's own, what cannot be, what the plan shows."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from test_optimizers import Training, equal, options

from library.base.errors import UserError
from library.optim.schedulers import CURVES, Schedule, build_schedule, rate_courses
from library.options.optimizer import OptimizerOptions
from library.options.schedule import READS, ScheduleOptions

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "training.json").read_text())
RECORDED = GOLDEN["lr_schedulers (base lr 1.0, 100 steps, 1 process)"]
UNIT = OptimizerOptions(learning_rate=1.0)
# the options behind the names of the record
GIVEN = {
    "constant": {"lr_warmup_steps": 0},
    "cosine_ratio": {"lr_scheduler": "cosine", "lr_warmup_steps": 0.1},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 3},
    "polynomial": {"lr_scheduler_power": 2.0},
    "inverse_sqrt_ts": {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 25},
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay_ratio": {
        "lr_scheduler": "warmup_stable_decay",
        "lr_warmup_steps": 0.1,
        "lr_decay_steps": 0.2,
    },
    "piecewise_constant": {
        "lr_warmup_steps": 0,
        "lr_scheduler_args": ["step_rules='1:10,0.1:20,0.01:30,0.005'"],
    },
}


def given(name):
    return ScheduleOptions(**{"lr_scheduler": name, "lr_warmup_steps": 10, **GIVEN.get(name, {})})


@pytest.mark.parametrize("name", [name for name, row in RECORDED.items() if "lr@" in row])
def test_recorded_curves(name):
    schedule = build_schedule(given(name), 100, UNIT)
    expected = {int(step): value for step, value in RECORDED[name]["lr@"].items()}
    assert {step: schedule.factor(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_recorded_errors_are_errors_or_work():
    errors = {name for name, row in RECORDED.items() if "error" in row}
    assert errors == {
        "reduce_lr_on_plateau",
        "cosine_warmup_with_min_lr",
        "constant_warm_err",
        "cosine_with_min_lr_none",
    }
    with pytest.raises(UserError, match="falls by chance"):
        build_schedule(given("reduce_lr_on_plateau"), 100, UNIT)
    with pytest.raises(UserError, match="use constant_with_warmup"):
        build_schedule(ScheduleOptions(lr_scheduler="constant", lr_warmup_steps=10), 100, UNIT)
    with pytest.raises(UserError, match="needs --lr_scheduler_min_lr_ratio, or min_lr"):
        build_schedule(ScheduleOptions(lr_scheduler="cosine_with_min_lr"), 100, UNIT)


def test_every_name_has_a_curve():
    assert set(CURVES) == set(READS)


TRANSFORMERS = {
    "linear": ({}, {}),
    "cosine": ({"lr_scheduler_args": ["num_cycles=0.8"]}, {"num_cycles": 0.8}),
    "cosine_with_restarts": ({"lr_scheduler_num_cycles": 4}, {"num_cycles": 4}),
    "polynomial": (
        {"lr_scheduler_power": 1.5, "lr_scheduler_args": ["lr_end=1e-3"]},
        {"power": 1.5, "lr_end": 1e-3},
    ),
    "inverse_sqrt": ({}, {}),
    "cosine_with_min_lr": ({"lr_scheduler_args": ["min_lr=0.01"]}, {"min_lr": 0.01}),
    "cosine_warmup_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_args": ["warmup_lr_rate=0.2"]},
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    ),
    "warmup_stable_decay": (
        {"lr_decay_steps": 15, "lr_scheduler_args": ["decay_type='1-sqrt'", "warmup_type='cosine'"]},
        {"num_decay_steps": 15, "decay_type": "1-sqrt", "warmup_type": "cosine"},
    ),
}


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_curves_are_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    ours, theirs = TRANSFORMERS[name]
    rate = 0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(name, optimizer, warmup, 50, scheduler_specific_kwargs=theirs)
    schedule = build_schedule(
        ScheduleOptions(lr_scheduler=name, lr_warmup_steps=warmup, **ours), 50, OptimizerOptions(learning_rate=rate)
    )
    for step in range(51):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * schedule.factor(step), abs=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr_scheduler": "cosine_with_restart"}, r"did you mean cosine_with_restarts\?"),
        ({"lr_scheduler": "adafactor:fast"}, "adafactor:RATE"),
        ({"lr_scheduler": "adafactor:0.1"}, "needs --optimizer_type Adafactor with relative_step=True"),
        ({"lr_scheduler": "piecewise_constant"}, "needs --lr_scheduler_args step_rules"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1,2'"]}, "expected e.g."),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_ends=1"]}, r"takes lr_end; did you mean lr_end\?"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=2"]}, "is above --learning_rate 1"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["num_cycles='x'"]}, "expected a number"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ["decay_type='x'"]}, "expected one of 'linear'"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 60, "lr_decay_steps": 0.5}, "together are longer"),
        (
            {
                "lr_scheduler": "cosine_with_min_lr",
                "lr_scheduler_min_lr_ratio": 0.1,
                "lr_scheduler_args": ["min_lr=0.1"],
            },
            "say the same",
        ),
        ({"lr_scheduler_type": "StepRL"}, r"has no such schedule class; did you mean StepLR\?"),
        ({"lr_scheduler_type": "nowhere.StepLR"}, "nowhere cannot be imported"),
        ({"lr_scheduler_type": "StepLR"}, "does not take these.*step_size"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 1}, "cannot be combined with --lr_scheduler_type"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "falls by chance"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size"]}, "expected name=value"),
    ],
)
def test_schedules_that_cannot_be(values, text):
    with pytest.raises(UserError, match=text):
        build_schedule(ScheduleOptions(**values), 100, UNIT)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "Adafactor"])
def test_some_optimizers_follow_no_schedule(name):
    schedule = build_schedule(ScheduleOptions(lr_scheduler="cosine"), 10, OptimizerOptions(optimizer_type=name))
    assert {schedule.factor(step) for step in range(10)} == {1.0}


OWN = {
    "CosineAnnealingLR": ["T_max=6"],
    "OneCycleLR": ["max_lr=0.1", "total_steps=9"],
    "MultiStepLR": ["milestones=[2,4]", "gamma=0.5"],
    "ExponentialLR": ["gamma=0.7"],
    "torch.optim.lr_scheduler.CyclicLR": ["base_lr=0.01", "max_lr=0.05", "step_size_up=3"],
    "CosineAnnealingWarmRestarts": ["T_0=2", "T_mult=2"],
}


class Wandering(torch.optim.lr_scheduler.LRScheduler):
    """Its rates depend on what the object has been given: here how many were made before it."""

    made = itertools.count(1)

    def __init__(self, optimizer, spread):
        self.factor = 1 + spread * next(self.made)
        super().__init__(optimizer)

    def get_lr(self):
        return [base / self.factor ** (self.last_epoch + 1) for base in self.base_lrs]


OWN["test_schedules.Wandering"] = ["spread=0.1"]


def own(name, arguments=None):
    given = ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=OWN[name] if arguments is None else arguments)
    return build_schedule(given, 9, UNIT)


@pytest.mark.parametrize("name", OWN)
def test_classes_of_ones_own_go_on_exactly(name, tmp_path):
    first = Training(options("AdamW"), own(name)).go(0, 4)
    resumed = Training(options("AdamW"), own(name)).load(first.save(tmp_path / "a-state", 4), 4)
    assert resumed.drive.learning_rates() == first.drive.learning_rates()
    resumed.go(4, 8)
    first.go(4, 8)
    assert resumed.drive.learning_rates() == first.drive.learning_rates()
    assert equal(resumed.values(), first.values())


def test_a_class_of_ones_own_sets_the_rate():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    training = Training(options("AdamW"), own("CosineAnnealingLR"))
    for step in range(8):
        assert training.drive.learning_rates()["a"] == optimizer.param_groups[0]["lr"]
        training.go(step, step + 1)
        optimizer.step()
        theirs.step()


def test_a_rate_set_by_hand_scales_a_class_of_ones_own(tmp_path):
    plain, set_to = (Training(options("AdamW"), own("ExponentialLR")) for _ in range(2))
    set_to.drive.set_rate(0.03)
    plain.go(0, 4)
    set_to.go(0, 4)
    assert set_to.drive.learning_rates()["b"] == pytest.approx(3 * plain.drive.learning_rates()["b"])
    resumed = Training(options("AdamW"), own("ExponentialLR")).load(set_to.save(tmp_path / "a-state", 4), 4)
    assert resumed.drive.learning_rates() == set_to.drive.learning_rates()


def test_another_rate_or_schedule_after_a_state(tmp_path):
    state = Training(options("AdamW"), own("ExponentialLR")).go(0, 4).save(tmp_path / "a-state", 4)
    doubled = Training(options("AdamW", rate=0.02), own("ExponentialLR")).load(state, 4)
    assert doubled.drive.learning_rates()["a"] == pytest.approx(0.02 * 0.7**4)
    other = Training(options("AdamW"), own("OneCycleLR"))
    ahead = Training(options("AdamW"), own("OneCycleLR")).go(0, 4)
    assert other.load(state, 4).drive.learning_rates() == ahead.drive.learning_rates()
    assert other.go(4, 5).drive.learning_rates() == ahead.go(4, 5).drive.learning_rates()


def test_a_run_that_begins_later_has_a_class_stand_there():
    later, straight = (Training(options("AdamW"), own("MultiStepLR")) for _ in range(2))
    later.drive.go_to(3)
    assert later.drive.learning_rates() == straight.go(0, 3).drive.learning_rates()


@pytest.mark.parametrize(
    ("schedule", "rates", "expected"),
    [
        (Schedule("constant", 0, 100), {"denoiser": 1e-4}, [("all parts", "1e-4")]),
        (
            Schedule("linear", 10, 100),
            {"denoiser": 1e-4, "text encoders": 1e-4},
            [("all parts", "0 at first, 1e-4 at most, 1.11e-6 at the end")],
        ),
        (
            Schedule("cosine", 0, 10),
            {"denoiser": 1.0, "text encoders": 2e-5},
            [("denoiser", "1 at first, 1 at most, 0.0245 at the end"),
             ("text encoders", "2e-5 at first, 2e-5 at most, 4.89e-7 at the end")],
        ),
        (Schedule("linear", 99, 100_000), {"a": 0.5}, [("all parts", "0 at first, 0.5 at most, 5e-6 at the end")]),
        (own("ExponentialLR"), {"a": 1.0}, [("all parts", "1 at first, 1 at most, 0.0576 at the end")]),
    ],
)  # fmt: skip
def test_what_the_plan_shows(schedule, rates, expected):
    total = schedule.total if isinstance(schedule, Schedule) else 9
    assert rate_courses(schedule, UNIT, rates, total) == expected


def test_what_the_plan_shows_of_rates_that_are_found():
    prodigy, adafactor = (OptimizerOptions(optimizer_type=name) for name in ("Prodigy", "Adafactor"))
    constant = Schedule("constant", 0, 9)
    (line,) = rate_courses(constant, prodigy, {"a": 1.0}, 9)
    assert line[1] == "1, times the size of steps that the optimizer finds"
    assert rate_courses(constant, adafactor, {"a": 1.0}, 9) == [("all parts", "worked out by Adafactor")]
