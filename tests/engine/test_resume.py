"""Going on from a state: the same as never having stopped, or a clear word why not."""

import json
import shutil

import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, save_file_atomic
from library.checkpoint.state_files import SavedState, decode, encode, find_states, read_state, recover, write_state

VARIED = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2\n"


class Runs:
    """Runs in one folder, with everything random that data and adapter can have."""

    def __init__(self, inputs, folder, family="flux"):
        self.inputs, self.folder, self.family = inputs, folder, family
        self.data = {"subset": VARIED, "batch_size": 2}

    def go(self, steps, *more, family=None, dim="4", plain=False):
        family = family or self.family
        toml = dataset_toml(self.folder, self.inputs, **self.data)
        given = ("--network_train_unet_only", "--network_dropout", "0.1")
        arguments = network_arguments(family, self.inputs, self.folder, toml, *given, *more)
        arguments[arguments.index("--max_train_steps") + 1] = str(steps)
        arguments[arguments.index("--network_dim") + 1] = dim
        if plain:
            at = arguments.index("--seed")
            del arguments[at : at + 2]
        return run_training(family, arguments)

    @property
    def out(self):
        return self.folder / "out"

    def tensors(self):
        return load_file(self.out / "last.safetensors")

    def states(self):
        return sorted(path.name for path in self.out.glob("*-state"))

    def head(self, name="last-state"):
        return json.loads((self.out / name / "state.json").read_text())


@pytest.fixture
def runs(inputs, tmp_path):
    return Runs(inputs, tmp_path)


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """Twelve steps in one go."""
    runs = Runs(inputs, tmp_path_factory.mktemp("straight"))
    return runs.go(12), runs.tensors()


END = ("--save_state_on_train_end",)
AUTO = ("--resume", "auto")


def assert_same(straight, outcome, tensors):
    assert outcome.losses == straight[0].losses
    assert all(torch.equal(tensors[name], straight[1][name]) for name in straight[1])


@pytest.mark.parametrize("first", [1, 4, 5, 6, 7])
def test_more_steps_are_the_same_as_all_at_once(runs, straight, first):
    """Also at the end of an epoch (6 batches) and beside it."""
    runs.go(first, *END)
    assert runs.head()["step"] == first
    assert_same(straight, runs.go(12, *AUTO), runs.tensors())


def test_going_on_again_and_again(runs, straight):
    for steps in (2, 5, 7, 11):
        runs.go(steps, *END, *AUTO)
    outcome = runs.go(12, "--resume", str(runs.out / "last-state"))
    assert_same(straight, outcome, runs.tensors())
    log = events(runs.out)
    assert [event["step"] for event in log if event["event"] == "step"] == list(range(1, 13))
    assert [event["step"] for event in log if event["event"] == "resume"] == [2, 5, 7, 11]


def test_other_workers_and_no_seed(runs, straight):
    runs.go(5, *END)
    outcome = runs.go(12, *AUTO, "--max_data_loader_n_workers", "2", plain=True)
    assert_same(straight, outcome, runs.tensors())


def test_other_accumulation_goes_on_in_the_same_order(runs, tmp_path):
    """Positions count batches, so a state fits any window; steps from then on take more batches."""
    record = tmp_path / "record"
    more = ("--record_steps", str(record), *AUTO)
    runs.go(2, *END, *more)
    runs.go(4, *more, "--gradient_accumulation_steps", "2")
    other = Runs(runs.inputs, tmp_path / "other")
    other.folder.mkdir()
    other.go(6, "--record_steps", str(tmp_path / "all"))
    ours, theirs = (
        [json.loads(line)["image_keys"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (record, tmp_path / "all")
    )
    assert ours == theirs


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "Adafactor"])
def test_optimizers_go_on(runs, tmp_path, optimizer):
    more = ("--optimizer_type", optimizer, "--lr_scheduler", "cosine")
    if optimizer == "AdamW8bit":
        more += ("--optimizer_args", "min_8bit_size=16")
    else:
        more += ("--optimizer_args", "relative_step=False", "scale_parameter=False")
    other = Runs(runs.inputs, tmp_path / "other")
    other.folder.mkdir()
    expected = other.go(8, *more), other.tensors()
    # stopped by its state, not by a shorter schedule
    runs.go(8, *more, "--save_every_n_steps", "3", "--save_state")
    shutil.rmtree(runs.out / "last-step00000006-state")
    shutil.rmtree(runs.out / "last-state")
    assert_same(expected, runs.go(8, *more, *AUTO), runs.tensors())


def test_a_longer_schedule_is_a_function_of_step_and_new_total(runs):
    more = ("--lr_scheduler", "cosine")
    runs.go(4, *END, *more)
    runs.go(8, *AUTO, *more)
    rates = [event["lr/unet"] for event in events(runs.out) if event["event"] == "step"]
    curve = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) * 1e-3 for step in range(4, 8)]
    assert rates[4:] == pytest.approx(curve, rel=1e-5)


def test_a_finished_run_has_nothing_to_do(runs):
    runs.go(3, *END)
    before = runs.tensors()
    outcome = runs.go(3, *AUTO)
    assert outcome.state.step == 3
    assert all(torch.equal(before[name], value) for name, value in runs.tensors().items())
    with pytest.raises(UserError, match="raise --max_train_steps"):
        runs.go(2, *AUTO)


def test_nothing_to_resume_starts_anew(runs, straight, messages):
    assert_same(straight, runs.go(12, *AUTO), runs.tensors())
    assert "no state of 'last'" in messages.text


def refused(runs, words, *more, steps=6, **changes):
    with pytest.raises(UserError) as error:
        runs.go(steps, *AUTO, *more, **changes)
    assert words in str(error.value)
    assert runs.states() == ["last-state"]


def test_what_does_not_fit_is_refused(runs, inputs, tmp_path):
    runs.go(2, *END)
    refused(runs, "--network_dim = 8: was 4", dim="8")
    refused(runs, "--network_args", "--network_args", "train_blocks=single")
    refused(runs, "is a state of family flux, not sd", family="sd")
    refused(runs, "leave it out to go on with that", "--seed", "43")
    model = tmp_path / "other.safetensors"
    tensors = load_file(inputs.model("flux1_dev"))
    save_file_atomic({**tensors, "img_in.bias": tensors["img_in.bias"] + 1}, model)
    refused(runs, "is another model than the one of", "--pretrained_model_name_or_path", str(model))


def test_changed_data_is_refused_or_begins_the_next_epoch(runs):
    runs.go(2, *END)
    runs.data = {**runs.data, "subset": VARIED + "num_repeats = 2\n"}
    refused(runs, "--resume_changed_data goes on with the next epoch")
    outcome = runs.go(6, *AUTO, "--resume_changed_data")
    assert (outcome.state.step, outcome.state.epoch, outcome.state.batch_in_epoch) == (6, 2, 4)
    # how often results are saved is nobody's business
    runs.go(7, "--resume", str(runs.out / "last-state"), "--resume_changed_data", "--save_every_n_steps", "7")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "state.json").unlink(), "holds no training state"),
        (lambda folder: (folder / "state.json").write_text('{"format": 9}'), "has format 9"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "lacks weights.safetensors"),
        (lambda folder: (folder / "optimizer.json").write_text("[1"), "is damaged"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_damaged_states_are_named(runs, damage, words):
    runs.go(2, *END)
    folder = runs.out / "last-state"
    damage(folder)
    with pytest.raises(UserError) as error:
        runs.go(4, "--resume", str(folder))
    assert words in str(error.value) and "--resume" in str(error.value)


def test_truncated_weights_of_a_state_are_named(runs):
    runs.go(2, *END)
    path = runs.out / "last-state" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="weights.safetensors.*damaged"):
        runs.go(4, "--resume", str(runs.out / "last-state"))


def test_auto_passes_over_damaged_and_foreign_states(runs):
    runs.go(6, "--save_every_n_steps", "2", "--save_state")
    assert runs.states() == ["last-state", *(f"last-step{n:08d}-state" for n in (2, 4, 6))]
    for name in ("last-state", "last-step00000006-state"):
        (runs.out / name / "state.json").write_text("{")
    shutil.copytree(runs.out / "last-step00000004-state", runs.out / "last-other-state")
    head = json.loads((runs.out / "last-other-state" / "state.json").read_text())
    (runs.out / "last-other-state" / "state.json").write_text(json.dumps({**head, "output_name": "other", "step": 99}))
    assert [path.name for path in find_states(runs.out, "last")] == [f"last-step{n:08d}-state" for n in (2, 4)]
    runs.go(8, *AUTO)
    assert [e["step"] for e in events(runs.out) if e["event"] == "resume"] == [4]


def test_states_of_accelerate_are_read_with_a_warning(runs, messages):
    """The layout of sd-scripts: weights, optimizer and step are taken."""
    runs.go(3, *END)
    own = read_state(runs.out / "last-state")
    folder = runs.folder / "foreign-state"
    folder.mkdir()
    save_file_atomic(own.weights, folder / "model.safetensors")
    torch.save(own.optimizer["optimizer"], folder / "optimizer.bin")
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": 3}))
    (folder / "random_states_0.pkl").write_bytes(b"")
    outcome = runs.go(6, "--resume", str(folder))
    assert outcome.state.step == 6
    assert messages.text.count("was written by another program") == 1
    tensors = runs.tensors()
    runs.go(3, *END)
    runs.go(6, *AUTO)
    # the same weights and moments, from the beginning of the epoch instead of its middle
    assert not all(torch.equal(tensors[name], value) for name, value in runs.tensors().items())
    torch.save({"x": print}, folder / "optimizer.bin")
    with pytest.raises(UserError, match="cannot be read as weights only"):
        runs.go(6, "--resume", str(folder))


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (("--initial_step", "8"), (8, 2, 0)),
        (("--initial_step", "8", "--skip_until_initial_step"), (8, 2, 2)),
        (("--initial_epoch", "2"), (6, 2, 0)),
        (("--initial_epoch", "2", "--initial_step", "3", "--skip_until_initial_step"), (3, 1, 3)),
    ],
)
def test_starting_later_has_an_absolute_meaning(runs, tmp_path, flags, state):
    """Of 14 steps those from the given one on are taken; the rate is that of their number."""
    record = tmp_path / "record"
    outcome = runs.go(14, *flags, "--lr_scheduler", "linear", "--record_steps", str(record))
    steps = [event for event in events(runs.out) if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(state[0] + 1, 15))
    assert steps[0]["lr/unet"] == pytest.approx(1e-3 * (1 - state[0] / 14))
    assert outcome.state.step == 14
    first = json.loads((record / "steps.jsonl").read_text().splitlines()[0])
    assert first["epoch"] == state[1]
    whole = Runs(runs.inputs, tmp_path / "whole")
    whole.folder.mkdir()
    whole.go(14, "--record_steps", str(tmp_path / "all"))
    lines = [json.loads(line) for line in (tmp_path / "all" / "steps.jsonl").read_text().splitlines()]
    at = [line for line in lines if line["epoch"] == state[1]][state[2]]
    assert first["image_keys"] == at["image_keys"]


def test_starting_beyond_the_end_is_refused(runs):
    with pytest.raises(UserError, match="raise --max_train_steps"):
        runs.go(4, "--initial_step", "5")


def test_rotation_of_states(runs):
    runs.go(9, "--save_every_n_steps", "2", "--save_state", "--save_last_n_steps_state", "3")
    assert runs.states() == ["last-state", "last-step00000006-state", "last-step00000008-state"]
    assert len(list(runs.out.glob("last-step*.safetensors"))) == 4
    # states of an earlier run with another cadence go as well
    runs.go(13, *AUTO, "--save_every_n_steps", "5", "--save_state", "--save_last_n_steps_state", "3")
    assert runs.states() == ["last-state", "last-step00000008-state", "last-step00000010-state"]


def test_states_by_epoch(runs):
    more = ("--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_state", "--save_last_n_epochs_state", "2")
    runs.go(1, *more)
    assert runs.states() == ["last-000002-state", "last-000003-state", "last-state"]
    assert runs.head("last-000003-state")["step"] == 18


def test_states_by_time(runs):
    """Only the latest of these stays."""
    runs.go(5, "--save_state_every_n_minutes", "0.00001")
    assert runs.states() == ["last-step00000005-state"]


def test_a_state_that_is_replaced_is_never_missing(tmp_path):
    head = {"epoch": 1, "step": 1, "output_name": "last"}
    folder = tmp_path / "last-state"
    write_state(folder, SavedState(head, {"a": torch.zeros(2)}, {"state": {}}))
    write_state(folder, SavedState({**head, "step": 2}, {"a": torch.ones(2)}, {"state": {}}))
    assert read_state(folder).head["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last-state"]
    # killed between stepping aside and moving in
    folder.rename(tmp_path / ".last-state.old")
    recover(tmp_path)
    assert read_state(folder).head["step"] == 2
    with pytest.raises(TypeError):
        write_state(folder, SavedState(head, {}, {"state": object()}))
    assert read_state(folder).head["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last-state"]


def test_structures_come_back_as_they_were():
    value = {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, dtype=torch.uint8)}, 1: {}}}
    value |= {"x": [1, (2, None)], "b": True, "inf": float("inf"), "text": "a.b"}
    tensors = {}
    made = json.loads(json.dumps(encode(value, "optimizer", tensors)))
    back = decode(made, tensors)
    assert back["x"] == [1, (2, None)] and back["b"] is True and back["inf"] == float("inf")
    assert list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][0]["m"], value["state"][0]["m"])


def test_two_trainings_in_one_process_do_not_touch_each_other(inputs, tmp_path, straight):
    """From Python, one after the other, of different families."""
    for name, family in (("a", "sd"), ("b", "flux")):
        (tmp_path / name).mkdir()
        runs = Runs(inputs, tmp_path / name, family)
        outcome = runs.go(12)
    assert_same(straight, outcome, runs.tensors())


def test_a_state_that_had_stepped_aside_is_found(runs, straight):
    """Killed between the old state's leaving and the new one's moving in."""
    runs.go(5, *END)
    (runs.out / "last-state").rename(runs.out / ".last-state.old")
    assert_same(straight, runs.go(12, *AUTO), runs.tensors())
    assert runs.states() == ["last-state"]


def test_a_dry_run_says_where_it_would_go_on_and_what_does_not_fit(runs, messages):
    runs.go(5, *END)
    outcome = runs.go(12, *AUTO, "--dry_run")
    assert outcome.state is None
    assert "step 5, epoch 1, after 5 of its batches" in messages.text
    with pytest.raises(UserError, match="network_dim"):
        runs.go(12, *AUTO, "--dry_run", dim="8")
    assert len([e for e in events(runs.out) if e["event"] == "step"]) == 5


def test_a_state_on_the_hub_that_cannot_be_fetched(runs):
    with pytest.raises(UserError, match="expected owner/repository/folder"):
        runs.go(2, "--resume", "somewhere", "--resume_from_huggingface")
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        runs.go(2, "--resume", "nobody/nothing/last-state", "--resume_from_huggingface")


def test_what_happened_after_the_state_is_cut_back(runs, straight, tmp_path):
    """A killed run has logged and recorded more than its last state knows; every step is there once afterwards."""
    record = tmp_path / "record"
    more = ("--record_steps", str(record), "--save_every_n_steps", "3", "--save_state")
    runs.go(8, *more)
    for name in ("last-state", "last-step00000006-state"):
        shutil.rmtree(runs.out / name)
    assert_same(straight, runs.go(12, *AUTO, *more), runs.tensors())
    assert [e["step"] for e in events(runs.out) if e["event"] == "step"] == list(range(1, 13))
    lines = [json.loads(line)["step"] for line in (record / "steps.jsonl").read_text().splitlines()]
    assert lines == list(range(12))


def test_the_oldest_state_within_the_window_stays(runs):
    runs.go(8, "--save_every_n_steps", "2", "--save_state", "--save_last_n_steps_state", "4")
    assert runs.states() == ["last-state", *(f"last-step{n:08d}-state" for n in (4, 6, 8))]
