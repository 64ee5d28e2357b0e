"""TensorBoard and wandb: what arrives there, and what must not."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from support.hub import TOKEN
from support.runs import dataset_toml, network_arguments, run_training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.base.errors import UserError
from library.options.tracking import TrackingOptions
from library.options.values import options_of
from library.tracking import recorded
from library.tracking.recorded import privacy_notes, recorded_options, tells_a_place
from library.tracking.trackers import Moment, Trackers, check_trackers, start_trackers, tracker_arguments
from library.train_util import load_family, parse_options

KEY = "abcdef0123456789" * 2 + "abcdef01"  # what a key of wandb looks like
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arguments(inputs, tmp_path):
    def make(*more, **dataset):
        data = dataset_toml(tmp_path, inputs, **dataset)
        return network_arguments("sd", inputs, tmp_path, data, *more)

    return make


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb on this disk only, beside everything else of the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    yield
    import wandb

    wandb.teardown()  # otherwise it remembers the folder


def curves(folder):
    """The events of the only run in a folder; options are recorded in a folder of their own inside."""
    found = min((path.parent for path in folder.rglob("events.out.tfevents*")), key=lambda path: len(path.parts))
    accumulator = EventAccumulator(str(found), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def records_of(data):
    """The records of a log in LevelDB's format: blocks of 32 KiB, records in pieces with headers of seven bytes."""
    at, piece = 7, b""  # after the name of the format
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        piece += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield piece
            piece = b""


def wandb_records(folder):
    """What wandb wrote: history (one dictionary per entry), name, project, tags, config, hidden keys, and all bytes."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process has written everything then

    (file,) = folder.rglob("*.wandb")
    found = {"history": [], "everything": b""}
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found["history"].append({name: json.loads(value) for name, value in items.items()})
        elif kind == "run":
            run = record.run
            found |= {"name": run.display_name, "project": run.project, "tags": list(run.tags)}
        elif kind == "config":
            values = {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
            found.setdefault("config", {}).update(values)
        elif kind == "metric" and record.metric.options.hidden:
            found.setdefault("hidden", set()).add(record.metric.name)
        found["everything"] += data
    return found


# runs


def test_sample_images_of_a_run_in_tensorboard(arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\na dog --w 64 --h 64 --s 2\n")
    more = ("--logging_dir", str(tmp_path / "logs"), "--sample_prompts", str(tmp_path / "prompts.txt"))
    run_training("sd", arguments(*more, "--sample_every_n_steps", "2"))
    found = curves(tmp_path / "logs")
    tags = found.Tags()["images"]
    assert len(tags) == 2 and all([event.step for event in found.Images(tag)] == [2, 4] for tag in tags)


def test_epochs_and_steps_in_tensorboard(arguments, tmp_path):
    data = {"batch_size": 4, "dataset": "validation_split = 0.3"}
    more = ("--logging_dir", str(tmp_path / "logs"), "--max_train_epochs", "2", "--validate_every_n_epochs", "1")
    run_training("sd", arguments(*more, **data))
    found = curves(tmp_path / "logs")
    steps = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    per_epoch = len(steps["loss/current"]) // 2
    assert steps["loss/current"] == steps["loss/average"] == list(range(1, 2 * per_epoch + 1))
    assert steps["loss/epoch_average"] == [1, 2]
    assert steps["loss/validation/epoch_average"] == [1, 2]
    by_step = next(steps[name] for name in steps if name.startswith("loss/validation/timestep_"))
    assert by_step == [per_epoch, 2 * per_epoch]


def test_a_run_in_wandb(arguments, tmp_path, offline, messages, monkeypatch):
    """Names, axes and options arrive; keys and paths do not, though wandb looks at the command line itself."""
    config = tmp_path / "trackers.toml"
    config.write_text('[wandb]\ntags = ["one", "two"]\nnotes = "mine"\n[tensorboard]\nflush_secs = 1\n')
    more = ("--log_with", "all", "--logging_dir", str(tmp_path / "logs"), "--log_config", "--wandb_run_name", "a run")
    more += ("--wandb_api_key", KEY, "--log_tracker_config", str(config), "--log_tracker_name", "my_project")
    given = arguments(*more, batch_size=4)
    monkeypatch.setattr(sys, "argv", ["train_network.py", *given, "--huggingface_token", TOKEN, f"--x={TOKEN}"])
    before = list(sys.argv)
    run_training("sd", [*given, "--huggingface_token", TOKEN])
    assert sys.argv == before
    (folder,) = (tmp_path / "logs").iterdir()
    found = wandb_records(folder)
    assert (found["name"], found["project"], found["tags"]) == ("a run", "my_project", ["one", "two"])
    assert found["hidden"] == {"epoch", "global_step", "val_step"}
    steps = [one for one in found["history"] if "loss/current" in one]
    assert [one["global_step"] for one in steps] == [1, 2, 3, 4]
    assert [one["epoch"] for one in steps] == [1, 1, 1, 2]
    assert {"loss/average", "lr/unet", "lr/textencoder", "norm/grad"} <= set(steps[0])
    (epoch,) = [one for one in found["history"] if "loss/epoch_average" in one]
    assert (epoch["epoch"], epoch["global_step"]) == (1, 3)
    assert found["config"]["network_dim"] == 4 and found["config"]["learning_rate"] == 1e-3
    assert "output_dir" not in found["config"]
    assert set(curves(folder / "my_project").Tags()["scalars"]) >= {"loss/current", "loss/average"}
    assert b"--huggingface_token" in found["everything"]  # it did look at the command line
    for place in (tmp_path / "logs", tmp_path / "out"):
        for file in place.rglob("*"):
            data = file.read_bytes() if file.is_file() else b""
            assert KEY.encode() not in data and TOKEN.encode() not in data, file
    assert KEY not in messages.text and TOKEN not in messages.text
    assert "--wandb_api_key is on the command line" in messages.text


def test_a_failed_run_is_one_in_wandb(arguments, tmp_path, offline, monkeypatch):
    from library.training import run

    def fail(*_):
        raise UserError("--lr", message="on purpose")

    monkeypatch.setattr(run, "_run_session", fail)
    codes = []
    real = Trackers.close
    monkeypatch.setattr(Trackers, "close", lambda self, failed: (codes.append(failed), real(self, failed=failed)))
    with pytest.raises(UserError, match="on purpose"):
        run_training("sd", arguments("--log_with", "wandb"))
    assert codes == [True]
    assert wandb_records(tmp_path)["everything"]


def test_images(tmp_path, offline):
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "red.png")
    values = {"log_with": "all", "logging_dir": "logs"}
    accelerator = Accelerator(log_with=["tensorboard", "wandb"], project_dir=str(tmp_path / "logs"))
    argv = [text for name, value in values.items() for text in (f"--{name}", value)]
    options = parse_options("sd", "network", argv)
    trackers = start_trackers(accelerator, options, "project", str(tmp_path / "logs"), 0)
    assert trackers
    trackers.image(tmp_path / "red.png", "a red thing", 3, Moment(7, 2))
    trackers.close(failed=False)
    found = curves(tmp_path / "logs" / "project")
    (image,) = found.Images("sample_3")
    assert (image.step, image.width, image.height) == (7, 8, 4)
    (entry,) = wandb_records(tmp_path / "logs")["history"]
    assert entry["sample_3/caption"] == "a red thing"
    assert (entry["global_step"], entry["epoch"]) == (7, 2)


def test_a_tracker_that_fails_ends_nothing(messages):
    class Broken:
        name = "tensorboard"

        def log(self, values, step):
            raise OSError("disk full")

    trackers = Trackers([Broken()])
    for step in (1, 2):
        trackers.log({"loss": 1.0}, Moment(step, 1))
    assert messages.text.count("the run goes on without it") == 1


# what is checked before anything loads


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[wandb\n", "is not valid TOML"),
        ("[wandb]\ntag = ['a']\n", "wandb.tag: is not an argument of init; did you mean 'tags'?"),
        ("[wandb]\nproject = 'x'\n", "wandb.project: is given by --log_tracker_name"),
        ("[tensorboard]\nlog_dir = 'x'\n", "tensorboard.log_dir: is given by --logging_dir"),
        ("[tensorbord]\nx = 1\n", "there are the tables"),
        ("name = 'x'\n", "expected a table"),
    ],
)
def test_files_of_arguments_that_cannot_be(tmp_path, content, text, arguments, offline):
    file = tmp_path / "trackers.toml"
    file.write_text(content)
    more = ("--log_with", "all", "--logging_dir", str(tmp_path / "logs"), "--log_tracker_config", str(file))
    with pytest.raises(UserError) as error:
        run_training("sd", arguments(*more, "--network_args", "nonsense=1"))
    assert text in str(error.value)
    assert "nonsense" in str(error.value)  # together with all other problems, so before anything loads
    assert not (tmp_path / "logs").exists()


def test_a_file_of_arguments_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--log_tracker_config = 'nowhere.toml': cannot be read"):
        tracker_arguments(TrackingOptions(logging_dir="logs", log_tracker_config="nowhere.toml"))


def test_arguments_of_a_tracker_that_is_not_used(tmp_path, messages):
    file = tmp_path / "trackers.toml"
    file.write_text("[wandb]\ntags = ['a']\n")
    assert tracker_arguments(TrackingOptions(logging_dir="logs", log_tracker_config=str(file))) == {}
    assert "[wandb] has no effect" in messages.text


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_packages(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_trackers(TrackingOptions(log_with=name, logging_dir="logs"))


def test_which_trackers():
    assert TrackingOptions().trackers == ()
    assert TrackingOptions(logging_dir="x").trackers == ("tensorboard",)
    assert TrackingOptions(log_with="wandb", logging_dir="x").trackers == ("wandb",)
    assert TrackingOptions(log_with="all", logging_dir="x").trackers == ("tensorboard", "wandb")
    assert [problem.where for problem in TrackingOptions(log_with="all").problems()] == ["--log_with"]


def test_a_tracker_that_does_not_start(arguments, tmp_path, offline):
    """One line, which does not repeat a key even where wandb does."""
    config = tmp_path / "trackers.toml"
    config.write_text(f"[wandb]\nmode = '{KEY}'\n")
    with pytest.raises(UserError) as error:
        run_training(
            "sd", arguments("--log_with", "wandb", "--wandb_api_key", KEY, "--log_tracker_config", str(config))
        )
    assert "does not start" in str(error.value) and "WANDB_MODE=offline" in str(error.value)
    assert "***" in str(error.value) and KEY not in str(error.value)


# what is recorded of options

HERE = str(Path(__file__).resolve())
FOREIGN = ("C:\\models\\x", "//server/share", "~/x", "model=/mnt/x", "rel/x.safetensors", "x.safetensors")


def every_option(family):
    line = load_family(family).command_line("network")
    shapes = options_of(line.groups, line.defaults, line.hidden, line.choices)
    return [item for items in shapes.values() for item in items]


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("place", [HERE, *FOREIGN])
def test_no_option_records_a_place(family, place):
    """Every text option of a script is set to it, whatever it means."""
    items = [item for item in every_option(family) if item.kind not in (bool, int, float) and not item.choices]
    texts = [item for item in items if item.kind is str or item.kind is Path]
    assert len(texts) > 40
    options = (
        load_family(family)
        .command_line("network")
        .from_values({item.name: [place] if item.many else place for item in texts if item.toml})
    )
    found = recorded_options(options)
    assert not [name for name, value in found.items() if place in str(value)]


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_everything_else_is_recorded(family):
    options = parse_options(family, "network", ["--wandb_api_key", KEY, "--huggingface_token", TOKEN, "--seed", "3"])
    found = recorded_options(options)
    assert found["seed"] == 3 and found["lr_scheduler"] == "constant" and found["save_state"] is False
    assert not {"wandb_api_key", "huggingface_token"} & set(found)
    assert {item.name for item in every_option(family)} - set(found) == recorded.SECRETS
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


def test_names_that_tell_a_place():
    assert tells_a_place("output_dir", "out") and tells_a_place("network_weights", "mine")
    assert not tells_a_place("network_module", "networks.lora_flux")
    assert not tells_a_place("network_args", ["conv_dim=4", "preset=full"])
    assert tells_a_place("network_args", ["preset=/x/y"])
    assert not tells_a_place("dim_from_weights", True)


def test_what_wandb_tells_others(tmp_path, monkeypatch):
    paths = ("--output_dir", str(tmp_path), "--train_data_dir", "relative", "--base_weights", str(tmp_path / "a"))
    flags = ("--log_with", "wandb", "--wandb_api_key", KEY, "--huggingface_token", TOKEN)
    hub = ("--huggingface_repo_id", "me/lora")
    warnings, remarks = privacy_notes(parse_options("sd", "network", [*flags, *paths, *hub]))
    assert ["WANDB_API_KEY" in warnings[0], "HF_TOKEN" in warnings[1]] == [True, True]
    assert "(--base_weights, --output_dir)" in remarks[0] and "--huggingface_repo_id" in remarks[1]
    assert KEY not in str(warnings + remarks) and TOKEN not in str(warnings + remarks)
    public = ("--huggingface_repo_visibility", "public")
    assert privacy_notes(parse_options("sd", "network", ["--log_with", "wandb", *hub, *public])) == ([], [])
    assert privacy_notes(parse_options("sd", "network", [*flags[2:], *paths])) == ([], [])
    config = tmp_path / "config.toml"
    config.write_text(f'log_with = "wandb"\nwandb_api_key = "{KEY}"\noutput_dir = "{tmp_path}"\n')
    warnings, remarks = privacy_notes(parse_options("sd", "network", ["--config_file", str(config)]))
    assert not warnings and all("--output_dir" not in text for text in remarks)
    assert any("--config_file" in text for text in remarks)


# processes

TIMEOUT = """
import sys
sys.path.insert(0, sys.argv[1])
from library.training.distributed import start_processes
start_processes("no", timeout=7)
import torch
group = torch.distributed.distributed_c10d._get_default_group()
print("<", group._get_backend(torch.device("cpu")).options._timeout, ">")
torch.distributed.destroy_process_group()
"""


@pytest.mark.dist
def test_patience_reaches_the_processes():
    """`--ddp_timeout 7`."""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    environment = {**os.environ, **launched, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-c", TIMEOUT, str(ROOT)], env=environment, capture_output=True, text=True, check=False
    )
    assert "< 0:07:00 >" in done.stdout, done.stderr[-2000:]


def test_the_option_is_handed_on(arguments, monkeypatch):
    from library.training import run

    seen = []
    real = run.start_processes
    monkeypatch.setattr(run, "start_processes", lambda *a, **k: (seen.append(k["timeout"]), real(*a, **k))[1])
    run_training("sd", arguments("--ddp_timeout", "3", "--dry_run"))
    assert seen == [3]
