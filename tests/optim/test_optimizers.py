"""Every optimizer by name: its class and defaults, a step, going on from a state, modes, rules."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from library.base.errors import UserError
from library.base.safetensors_io import load_file
from library.checkpoint.state_files import SavedState, read_state, write_state
from library.optim.driver import OptimizerDriver
from library.optim.registry import OPTIMIZERS, build_optimizer, check_optimizer, has_modes
from library.optim.schedulers import Schedule, build_schedule
from library.options.optimizer import OptimizerOptions
from library.options.rates import rewritten_rates
from library.options.schedule import ScheduleOptions
from library.train_util import check_options, make_options

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "training.json").read_text())["optimizers"]
SD = {"pretrained_model_name_or_path": "m.safetensors", "dataset_config": "d.toml", "output_dir": "out"}
SMALL = "min_8bit_size=16"  # so that small weights have 8-bit states too
# what bitsandbytes calls by another name, and what is trained here beside the documented names
CLASSES = {"sgdnesterov8bit": "SGD8bit", "sgdnesterov": "SGD", "dadaptation": "DAdaptAdamPreprint"}
OTHERS = ["NAdam", "torch.optim.RMSprop", "prodigyplus.ProdigyPlusScheduleFree", "bitsandbytes.optim.AdEMAMix8bit"]
NAMES = [*(entry.name for entry in OPTIMIZERS.values()), *OTHERS]


def options(name, *arguments, rate=None):
    finds = name.lower().startswith(("dadapt", "prodigy"))
    if name.endswith("8bit"):
        arguments = (SMALL, *arguments)
    rate = rate or (1.0 if finds else 0.01)
    return OptimizerOptions(optimizer_type=name, learning_rate=rate, optimizer_args=list(arguments))


class Training:
    """A few weights that a step changes by a gradient which depends on them."""

    def __init__(self, given, schedule=None, dtype=torch.float32, max_grad_norm=1.0, second=1.0):
        torch.manual_seed(5)
        shapes = [(16, 8), (8, 40)]
        self.weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        rates = (given.learning_rate, second * given.learning_rate)
        groups = [{"params": [one], "lr": rate} for one, rate in zip(self.weights, rates)]
        self.drive = OptimizerDriver(
            build_optimizer(given, groups),
            schedule or Schedule("constant", 0, 10),
            self.weights,
            max_grad_norm=max_grad_norm,
            names=["a", "b"],
        )

    def go(self, first, last, *, before=lambda training, step: None):
        for step in range(first, last):
            before(self, step)
            target = torch.Generator().manual_seed(step)
            torch.manual_seed(step)  # the engine does it before every micro-step
            loss = sum(((w.float() - torch.randn(w.shape, generator=target)) ** 2).sum() for w in self.weights)
            self.drive.backward(loss)
            self.drive.clip()
            self.drive.step()
        return self

    def values(self):
        return [one.detach().clone() for one in self.weights]

    def state(self):
        """All tensors of the optimizer's state: (format, content)."""
        states = [self.drive.optimizer.state[one] for one in self.weights]
        kept = [value for one in states for _, value in sorted(one.items()) if isinstance(value, torch.Tensor)]
        return [(one.dtype, one.tolist()) for one in kept]

    def save(self, folder, step):
        head = {"step": step, "epoch": 1}
        weights = {str(n): one for n, one in enumerate(self.values())}
        write_state(folder, SavedState(head, weights, self.drive.state()))
        return folder

    def load(self, folder, step):
        saved = read_state(folder)
        with torch.no_grad():
            for n, one in enumerate(self.weights):
                one.copy_(saved.weights[str(n)])
        self.drive.load_state(saved.optimizer, step)
        return self


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


def available(name):
    """Packages that are not among the optional ones of this project may be missing."""
    module = name.rpartition(".")[0].partition(".")[0]
    return not module or importlib.util.find_spec(module) is not None


def golden_rows():
    for key, expected in GOLDEN.items():
        name, _, arguments = key.partition("--optimizer_args")
        yield pytest.param(name.strip(), shlex.split(arguments), expected, id=key.strip() or "empty")


def _shown(value):
    return value if value is None or isinstance(value, bool | int | float) else str(value)


@pytest.mark.parametrize(("name", "arguments", "expected"), golden_rows())
def test_recorded_classes_and_defaults(name, arguments, expected):
    if not available(name):
        pytest.skip(f"{name} is not installed")
    given = OptimizerOptions(optimizer_type=name, learning_rate=0.001, optimizer_args=arguments)
    if isinstance(expected, str):
        # what was not installed there, or failed for no good reason, works here; a bad literal stays an error
        if arguments:
            with pytest.raises(UserError, match="literal"):
                build_optimizer(given, [{"params": [nn.Parameter(torch.zeros(2, 2))]}])
        else:
            check_optimizer(given)
        return
    built = build_optimizer(given, [{"params": [nn.Parameter(torch.zeros(2, 2))]}])
    shown = expected["name"] + (f"({expected['args']})" if expected["args"] else "")
    assert built.description == shown
    (group,) = built.optimizer.param_groups
    if has_modes(built.optimizer):
        built.optimizer.train()
    ours = {key: _shown(value) for key, value in group.items()}
    recorded = expected["group"]
    if "prodigyplus" in name or "pytorch_optimizer" in name:  # recorded with other versions of these packages
        recorded = {key: value for key, value in recorded.items() if key in ours and key != "beta3"}
    assert {key: ours.get(key, "missing") for key in recorded} == recorded


def test_what_adafactor_rewrites_is_as_recorded():
    row = GOLDEN["Adafactor "]
    given = make_options("sd", "network", {"optimizer_type": "Adafactor", "learning_rate": 0.001, "unet_lr": 0.1})
    found = rewritten_rates(given)
    assert (found["lr_scheduler"], found["learning_rate"]) == (row["lr_scheduler_after"], row["learning_rate_after"])
    assert found["unet_lr"] is found["text_encoder_lr"] is None
    manual = given.replace(OptimizerOptions, optimizer_args=["relative_step=False"])
    assert rewritten_rates(manual) == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains(name):
    given = options(name)
    check_optimizer(given)
    training = Training(given)
    assert type(training.drive.optimizer).__name__ == CLASSES.get(name.lower(), name.rpartition(".")[2])
    before = training.values()
    training.go(0, 7)  # RAdamScheduleFree waits for a few
    assert all(torch.isfinite(one).all() for one in training.values())
    assert not any(torch.equal(a, b) for a, b in zip(training.values(), before))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_on_exactly(name, tmp_path):
    given = options(name)
    straight = Training(given).go(0, 6)
    state = Training(given).go(0, 3).save(tmp_path / "a-state", 3)
    resumed = Training(given).load(state, 3).go(3, 6)
    assert equal(resumed.values(), straight.values())
    assert resumed.state() == straight.state()
    assert resumed.drive.learning_rates() == straight.drive.learning_rates()


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "prodigyplus.ProdigyPlusScheduleFree", "Prodigy"])
def test_half_precision_goes_on_exactly(name, tmp_path):
    """Numbers that are finer than the weights stay as fine."""
    given = options(name)
    straight = Training(given, dtype=torch.bfloat16).go(0, 6)
    state = Training(given, dtype=torch.bfloat16).go(0, 3).save(tmp_path / "a-state", 3)
    resumed = Training(given, dtype=torch.bfloat16).load(state, 3).go(3, 6)
    assert equal(resumed.values(), straight.values())
    assert resumed.state() == straight.state()


def test_eight_bit_states_are_eight_bit():
    training = Training(options("AdamW8bit")).go(0, 1)
    assert training.drive.optimizer.state[training.weights[0]]["state1"].dtype == torch.uint8


SWITCHING = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "prodigyplus.ProdigyPlusScheduleFree"]


@pytest.mark.parametrize("name", SWITCHING)
def test_looking_at_the_averaged_weights_changes_nothing(name, tmp_path):
    given = options(name)

    def look(training, step):
        if step % 2 == 0:
            with training.drive.evaluating():
                pass

    straight = Training(given).go(0, 6)
    looked = Training(given).go(0, 6, before=look)
    assert equal(looked.values(), straight.values())
    training, outside = looked, looked.values()
    with training.drive.evaluating():
        inside = training.values()
        assert not equal(inside, outside)
    assert equal(training.values(), outside)
    # a state holds what is trained on
    state = training.save(tmp_path / "a-state", 6)
    assert equal(list(load_file(state / "weights.safetensors").values()), outside)


@pytest.mark.parametrize("name", SWITCHING[:3])
def test_a_state_with_the_averaged_weights_is_turned_back(name):
    """sd-scripts saves states in this mode."""
    training = Training(options(name)).go(0, 3)
    trained = training.values()
    training.drive.optimizer.eval()
    state = training.drive.state()
    other = Training(options(name))
    with torch.no_grad():
        for one, value in zip(other.weights, training.values()):
            one.copy_(value)
    other.drive.load_state(state, 3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(other.values(), trained))


def test_others_have_no_modes():
    training = Training(options("AdamW")).go(0, 1)
    before = training.weights[0].data_ptr()
    with training.drive.evaluating():
        assert training.weights[0].data_ptr() == before


def test_the_found_size_of_steps_is_shown():
    rates = Training(options("Prodigy", "d0=1e-4")).drive.learning_rates()
    assert rates == {"a": 1.0, "b": 1.0, "d*lr/a": 1e-4, "d*lr/b": 1e-4}
    plus = Training(options("prodigyplus.ProdigyPlusScheduleFree", "d0=1e-4")).drive.learning_rates()
    assert plus == {"a": 1.0, "b": 1.0, "d*lr": 1e-4, "d*lr/group1": 1e-4}
    assert Training(options("AdamW")).drive.learning_rates() == {"a": 0.01, "b": 0.01}


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptation", "DAdaptLion"])
def test_one_rate_for_all_parts(name, messages):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [one], "lr": rate} for one, rate in zip(weights, (1.0, 0.5, 0.0))]
    built = build_optimizer(options(name), groups)
    assert [group["lr"] for group in built.optimizer.param_groups] == [1.0, 1.0, 0.0]
    assert f"{name} knows one learning rate for all parts: the first, 1, counts" in messages.text
    for one in weights:
        one.grad = torch.ones(2)
    built.optimizer.step()


@pytest.mark.parametrize("name", ["SGDNesterov", "SGDNesterov8bit"])
def test_momentum(name, messages):
    check_optimizer(options(name))
    assert f"{name}: momentum=0.9 is used" in messages.text
    (group, _) = Training(options(name, "momentum=0.5")).drive.optimizer.param_groups
    if name == "SGDNesterov":
        assert (group["momentum"], group["nesterov"]) == (0.5, True)
    else:
        assert group["betas"] == (0.5, 0)  # that is how bitsandbytes keeps it
    with pytest.raises(UserError, match="means nesterov=True"):
        check_optimizer(options(name, "nesterov=False"))


def test_another_spelling_of_torch_is_understood(messages):
    check_optimizer(OptimizerOptions(optimizer_type="radam"))
    assert "radam is taken as torch.optim.RAdam" in messages.text


def test_older_flags_name_optimizers():
    lion = build_optimizer(OptimizerOptions(use_lion_optimizer=True), [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert lion.description == "lion_pytorch.lion_pytorch.Lion"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("Prodgy", [], r"known are AdamW, Lion.*did you mean Prodigy\?"),
        ("AdamZ", [], r"did you mean Adam"),
        ("DAdaptFoo", [], "did you mean DAdapt"),
        ("lr_scheduler", [], "unknown"),
        ("Optimizer", [], "unknown"),
        ("nowhere.Adam", [], "needs the package 'nowhere'.*pip install nowhere"),
        ("bitsandbytes.optim.AdEMAMix8bits", [], r"did you mean bitsandbytes.optim.AdEMAMix8bit\?"),
        ("json.JSONDecoder", [], "has no optimizer JSONDecoder"),
        ("AdamW", ["weigt_decay=0.1"], r"did you mean weight_decay\?"),
        ("AdamW", ["betas=2"], "does not take these"),
        ("AdamW", ["lr=1"], "use --learning_rate"),
        ("AdamW", ["a"], "expected name=value"),
        ("AdamW", ["foo=bar"], "text needs quotes"),
        ("AdamW", ["eps=1", "eps=2"], "eps is given twice"),
        ("LBFGS", [], "evaluates the loss several times"),
        ("SparseAdam", [], "cannot train dense weights"),
    ],
)
def test_optimizers_that_cannot_be(name, arguments, text):
    with pytest.raises(UserError, match=text) as caught:
        check_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=arguments, learning_rate=0.1))
    assert caught.value.problems[0].where.startswith("--optimizer_")


def test_a_rate_that_the_optimizer_refuses():
    with pytest.raises(UserError, match="--learning_rate = 0.0: Prodigy does not take it"):
        check_optimizer(OptimizerOptions(optimizer_type="Prodigy", learning_rate=0.0))


def test_values_may_hold_an_equals_sign():
    with pytest.raises(UserError, match="clip_threshold"):  # read, and then refused by name
        check_optimizer(OptimizerOptions(optimizer_type="Adafactor", optimizer_args=["clip='a=b'"]))


def test_a_missing_package_names_its_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(UserError, match="--optimizer_type Prodigy: needs the package 'prodigyopt'.*pip install prod"):
        check_optimizer(OptimizerOptions(optimizer_type="prodigy"))


def said(messages, **values):
    messages.clear()
    check_options("sd", "network", make_options("sd", "network", {**SD, **values}))
    return [record.message for record in messages.records]


ADAFACTOR = {"optimizer_type": "Adafactor"}
MANUAL = {**ADAFACTOR, "optimizer_args": ["relative_step=False"], "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, []),
        ({"optimizer_type": "Prodigy", "learning_rate": 0.1}, ["a learning rate of 0.1 is very low for Prodigy"]),
        ({"optimizer_type": "dadaptsgd", "learning_rate": 1.0, "unet_lr": 0.01}, ["0.01 is very low for dadaptsgd"]),
        (ADAFACTOR, []),
        (
            {**ADAFACTOR, "learning_rate": 0.1, "unet_lr": 0.2},
            ["--learning_rate, --unet_lr have no effect: Adafactor works out its own rate"],
        ),
        ({**ADAFACTOR, "lr_scheduler": "cosine"}, ["--lr_scheduler has no effect: Adafactor"]),
        ({**ADAFACTOR, "lr_scheduler": "adafactor:0.01"}, []),
        (
            {**ADAFACTOR, "optimizer_args": ["relative_step=False", "warmup_init=True"]},
            ["relative_step=False has no effect beside warmup_init=True"],
        ),
        ({**MANUAL, "lr_scheduler": "constant_with_warmup"}, []),
        (MANUAL, ["--lr_scheduler constant_with_warmup is recommended"]),
        (
            {**MANUAL, "optimizer_args": ["relative_step=False", "clip_threshold=2.0"], "max_grad_norm": 1.0},
            ["--max_grad_norm 1 clips", "constant_with_warmup is recommended", "clip_threshold=1.0 is recommended"],
        ),
        (
            {**ADAFACTOR, "fused_backward_pass": True, "max_grad_norm": 0.0, "network_args": ["ggpo_sigma=0.1"]},
            ["the ggpo_ arguments of the network see no gradients"],
        ),
        ({**ADAFACTOR, "fused_backward_pass": True}, ["--max_grad_norm 1 has no effect with --fused_backward_pass"]),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine", "lr_warmup_steps": 3},
            ["--lr_scheduler has no effect: AdamWScheduleFree needs no schedule; warmup_steps=N", "--lr_warmup_steps"],
        ),
        ({"lr_scheduler": "linear", "lr_scheduler_power": 2.0}, ["--lr_scheduler_power has no effect with"]),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3"], "lr_scheduler": "cosine"},
            ["--lr_scheduler has no effect with --lr_scheduler_type"],
        ),
    ],
)
def test_what_is_advised(values, texts, messages):
    found = said(messages, **values)
    assert len(found) == len(texts), found
    for text, one in zip(texts, found):
        assert text in one


def test_warmup_of_a_relative_rate():
    given = OptimizerOptions(**ADAFACTOR)
    with pytest.raises(UserError, match="warmup_init=True in --optimizer_args is its warm-up"):
        build_schedule(ScheduleOptions(lr_warmup_steps=3), 10, given)
    both = OptimizerOptions(**ADAFACTOR, optimizer_args=["relative_step=False", "warmup_init=True"])
    built = build_optimizer(both, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5}])
    assert built.relative_step and built.optimizer.param_groups[0]["relative_step"]
    assert built.optimizer.param_groups[0]["lr"] is None


def test_skipped_steps_count_in_the_schedule():
    training = Training(options("AdamW"), Schedule("linear", 0, 10))
    training.drive.skip()
    assert training.drive.learning_rates()["a"] == pytest.approx(0.009)
