"""Whole runs that stop and go on, where the optimizer or the schedule keeps more than moments."""

import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.safetensors_io import load_file


def go(inputs, folder, steps, *more):
    folder.mkdir(exist_ok=True)
    arguments = network_arguments("sd", inputs, folder, dataset_toml(folder, inputs), *more)
    arguments[arguments.index("--max_train_steps") + 1] = str(steps)
    outcome = run_training("sd", [*arguments, "--network_train_unet_only"])
    return outcome.losses, load_file(folder / "out" / "last.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer_type", "AdamWScheduleFree"),
        ("--optimizer_type", "Prodigy", "--learning_rate", "1"),
        ("--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=4"),
    ],
    ids=lambda more: more[1],
)
def test_stopped_and_resumed_is_the_same(more, inputs, tmp_path, messages):
    losses, tensors = go(inputs, tmp_path / "straight", 4, *more)
    parts = tmp_path / "parts"
    go(inputs, parts, 2, *more, "--save_state_on_train_end")
    state = load_file(parts / "out" / "last-state" / "weights.safetensors")
    saved = load_file(parts / "out" / "last.safetensors")
    same = all(torch.equal(saved[name], state[name]) for name in saved if name in state)
    assert same == ("AdamWScheduleFree" not in more)  # a state holds what is trained on, a file what is to be used
    resumed, end = go(inputs, parts, 4, *more, "--resume", "auto")
    assert resumed == losses
    assert all(torch.equal(end[name], tensors[name]) for name in tensors)
    step = next(event for event in events(parts / "out") if event["event"] == "step")
    assert ("lr/d*lr/unet" in step) == ("Prodigy" in more)
    assert any(("learning rate" in text and "1e-3" in text) or "1, times" in text for text in messages.messages)
