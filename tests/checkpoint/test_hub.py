"""Uploads to a stand-in of the hub, and going on from a state that lies there."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from support.hub import TOKEN, StandIn
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, read_header
from library.checkpoint.hub import Uploader, download_state, open_repository
from library.options.hub import HubOptions
from library.train_util import main, parse_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which is where the library looks; its cache is empty, no token lies about."""
    standin = StandIn()
    monkeypatch.setenv("HF_ENDPOINT", standin.url)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield standin
    standin.close()


def options(**values):
    return HubOptions(**{"huggingface_repo_id": "me/lora", "huggingface_token": TOKEN, **values})


UPLOAD = ("--huggingface_repo_id", "me/lora", "--huggingface_token", TOKEN)


@pytest.fixture
def arguments(inputs, tmp_path):
    def make(*more, folder=tmp_path):
        folder.mkdir(exist_ok=True)
        data = dataset_toml(folder, inputs, batch_size=2)
        return network_arguments("sd", inputs, folder, data, "--network_train_unet_only", *more)

    return make


# the repository


def test_the_repository_is_made_private(hub):
    repository = open_repository(options())
    assert hub.private == {"models/me/lora": True}
    assert repository.place(Path("out/a.safetensors")) == "a.safetensors"
    assert ("GET", "api/models/me/lora/auth-check/write") in hub.requests


def test_public_only_when_it_says_so(hub, messages):
    open_repository(options(huggingface_repo_visibility="Public"))
    assert hub.private == {"models/me/lora": True}
    assert "anything but public means private" in messages.text
    open_repository(options(huggingface_repo_id="me/other", huggingface_repo_visibility="public"))
    assert hub.private["models/me/other"] is False


def test_a_public_repository_that_is_there_is_pointed_out(hub, messages):
    hub.make("models/me/lora", private=False)
    open_repository(options())
    assert "is there already and is public" in messages.text


def test_datasets_and_names_without_owner(hub):
    repository = open_repository(options(huggingface_repo_id="lora", huggingface_repo_type="dataset"))
    assert list(hub.repos) == ["datasets/me/lora"]
    assert repository.name == "me/lora"


def test_the_token_of_the_environment(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_repository(options(huggingface_token=None)).name == "me/lora"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"huggingface_token": "hf_wrongWrongWrong"}, "HTTP 401"),
        ({"huggingface_token": None}, "HTTP 401"),
        ({"huggingface_token": "hf_readsOnly"}, "HTTP 403"),
        ({"huggingface_repo_id": "a/b/c"}, "Repo id must be"),
    ],
)
def test_what_cannot_be_uploaded_to(hub, change, text):
    hub.readers.add("hf_readsOnly")
    hub.make("models/me/lora")
    with pytest.raises(UserError) as error:
        open_repository(options(**change))
    assert text in str(error.value) and "HF_TOKEN" in str(error.value)
    assert str(change.get("huggingface_token")) not in str(error.value)


def test_no_connection(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be uploaded to: .*check .* the connection"):
        open_repository(options())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        open_repository(options())


@pytest.mark.parametrize(
    ("values", "where"),
    [({"huggingface_repo_type": "modle"}, "_type"), ({"huggingface_path_in_repo": "../up"}, "_path_in_repo")],
)
def test_options_that_mean_nothing(values, where):
    (problem,) = options(**values).problems()
    assert problem.where.endswith(where)


# the uploader


@pytest.fixture
def upload(hub, tmp_path):
    """(uploader, function that writes a file of its)."""
    told = []

    def make(*, background, **values):
        uploader = Uploader(
            open_repository(options(**values)),
            tmp_path / "held",
            background=background,
            tell=lambda event, **values: told.append((event, values)),
        )
        uploader.told = told
        return uploader

    return make


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("background", [False, True])
def test_what_is_removed_or_replaced_meanwhile_arrives_as_it_was(hub, upload, tmp_path, background):
    uploader = upload(background=background, huggingface_path_in_repo="/runs/one/")
    if background:
        hub.gate.clear()
    for name in "ab":
        uploader.add(write(tmp_path / name, name * 3))
    if background:
        assert hub.uploading.wait(10)
        assert not hub.files()
    for name in "ab":
        (tmp_path / name).unlink()
    hub.gate.set()
    uploader.close()
    assert hub.files() == {"runs/one/a": b"aaa", "runs/one/b": b"bbb"}
    assert [event for event, _ in uploader.told] == ["uploaded", "uploaded"]
    assert not (tmp_path / "held").exists()


def test_only_the_newest_of_what_waits(hub, upload, tmp_path):
    uploader = upload(background=True)
    hub.gate.clear()
    uploader.add(write(tmp_path / "first", "1"))
    assert hub.uploading.wait(10)
    for text in ("old", "new"):
        (tmp_path / "best").unlink(missing_ok=True)
        uploader.add(write(tmp_path / "best", text))
    hub.gate.set()
    uploader.close()
    assert hub.files() == {"first": b"1", "best": b"new"}
    assert [event for event, _ in uploader.told] == ["uploaded", "uploaded"]
    assert len(hub.repos["models/me/lora"]) == 3


def test_without_hard_links(hub, upload, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    uploader = upload(background=True)
    hub.gate.clear()
    folder = tmp_path / "x-state"
    folder.mkdir()
    write(folder / "state.json", "{}")
    write(folder / "weights", "w")
    uploader.add(folder)
    shutil.rmtree(folder)
    hub.gate.set()
    uploader.close()
    assert hub.files() == {"x-state/state.json": b"{}", "x-state/weights": b"w"}
    assert len(hub.repos["models/me/lora"]) == 2  # one commit: a state is there or not


def test_a_failed_upload_says_how_to_do_it_by_hand(hub, upload, tmp_path, messages):
    uploader = upload(background=False, huggingface_path_in_repo="my runs", huggingface_repo_type="dataset")
    hub.failures["/commit/"] = (500, f"no space for {TOKEN}")
    for name in ("a", "b", "gone"):
        uploader.add(write(tmp_path / name, name))
    (tmp_path / "gone").unlink()
    del hub.failures["/commit/"]
    uploader.add(tmp_path / "b")  # saved again, and this time it works
    uploader.close()
    warnings = [record.message for record in messages.records if record.levelname == "WARNING"]
    assert len(warnings) == 2  # the same reason is not said again
    assert "a is not uploaded: HTTP 500, no space for ***; the training goes on" in warnings[0]
    command = next(line.partition("by hand: ")[2] for line in warnings[1].splitlines() if "by hand" in line)
    assert shlex.split(command) == [
        "hf",
        "upload",
        "me/lora",
        str(tmp_path / "a"),
        "my runs/a",
        "--repo-type",
        "dataset",
    ]
    assert "gone (HTTP 500, no space for ***); it was removed since" in warnings[1]
    assert "  b (" not in warnings[1]
    assert TOKEN not in messages.text


# a whole run


def read_all(folder):
    """Everything in a folder, one after the other."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("more", [(), ("--async_upload",)])
def test_a_run_uploads_what_it_saves(hub, arguments, tmp_path, messages, more):
    """With rotation: what is gone from the disk is on the hub all the same. The token is nowhere."""
    saving = ("--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state", "--save_state_to_huggingface")
    averaging = ("--ema_decay", "0.9")
    logging = ("--logging_dir", str(tmp_path / "logs"), "--log_config")
    given = arguments(*UPLOAD, *more, *saving, *averaging, *logging, "--huggingface_path_in_repo", "sd/one")
    outcome = run_training("sd", given)
    steps = [f"last-step{n:08d}" for n in (1, 2, 3, 4)]
    results = {f"sd/one/{name}{kind}.safetensors" for name in (*steps, "last") for kind in ("", "-ema")}
    names = ("state.json", "train_state.json", "weights.safetensors", "optimizer.safetensors", "optimizer.json")
    states = {f"sd/one/{step}-state/{name}" for step in (*steps, "last") for name in names}
    assert set(hub.files()) == results | states
    out = tmp_path / "out"
    assert not (out / "last-step00000001.safetensors").exists()
    assert not (out / "last-step00000001-state").exists()
    for path in outcome.saved:
        assert hub.files()[f"sd/one/{path.name}"] == path.read_bytes()
    log = events(out)
    assert sum(event["event"] == "uploaded" for event in log) == len(results) + 5
    assert log[-1]["event"] == "end"
    assert not list(out.glob(".*.tmp"))
    assert "uploaded to me/lora: " in messages.text
    secret = TOKEN.encode()
    assert secret not in read_all(out) and secret not in read_all(tmp_path / "logs")
    assert secret not in b"".join(hub.files().values())
    assert TOKEN not in messages.text and TOKEN not in json.dumps(read_header(out / "last.safetensors")[1])


def test_uploads_beside_the_training_hold_nobody_up(hub, arguments, tmp_path, messages):
    """All steps are taken while the first upload is stuck; then it is waited for, with a word."""
    hub.gate.clear()
    done = threading.Event()

    def open_later():
        while not any("waiting for" in record.message for record in messages.records) and not done.wait(0.05):
            pass
        assert hub.order() == []
        hub.gate.set()

    helper = threading.Thread(target=open_later)
    helper.start()
    try:
        given = arguments(*UPLOAD, "--async_upload", "--save_every_n_steps", "1", "--save_last_n_steps", "1")
        outcome = run_training("sd", given)
    finally:
        done.set()
        helper.join()
    assert outcome.state.step == 4
    (line,) = [record.message for record in messages.records if "waiting for" in record.message]
    assert "5 uploads to me/lora: last-step00000001.safetensors" in line and "last.safetensors" in line
    assert hub.order() == [*(f"last-step{n:08d}.safetensors" for n in (1, 2, 3, 4)), "last.safetensors"]


def test_quit_and_errors_wait_for_uploads_too(hub, arguments, tmp_path):
    out = tmp_path / "out"
    slow = threading.Timer(0.5, hub.gate.set)
    hub.gate.clear()
    slow.start()
    # orders of an earlier run are forgotten when one begins, so this one comes from a save
    from library.checkpoint import saver

    real = saver.Saver._save

    def save(self, path, step, epoch):
        real(self, path, step, epoch)
        write(out / "last.control", "quit\n")

    given = arguments(*UPLOAD, "--async_upload", "--save_every_n_steps", "1", "--save_state_to_huggingface")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saver.Saver, "_save", save)
        outcome = run_training("sd", given)
    assert outcome.state.step < 4 and outcome.exit_code == 0
    assert "last-step00000001.safetensors" in hub.files()
    assert f"last-step{outcome.state.step:08d}-state/state.json" in hub.files()

    hub.repos.clear()
    hub.gate.clear()
    threading.Timer(0.5, hub.gate.set).start()

    def fail(self, path, step, epoch):
        real(self, path, step, epoch)
        raise UserError("step", message="broken on purpose")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(saver.Saver, "_save", fail)
        with pytest.raises(UserError, match="on purpose"):
            run_training("sd", given)
    assert list(hub.files()) == ["last-step00000001.safetensors"]


def test_a_wrong_token_stops_before_weights_load(hub, arguments, monkeypatch):
    from library.training import run

    def never(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(run, "build_session", never)
    given = arguments("--huggingface_repo_id", "me/lora", "--huggingface_token", "hf_wrongWrongWrong")
    with pytest.raises(UserError, match="--huggingface_repo_id = 'me/lora': cannot be uploaded to: HTTP 401"):
        run_training("sd", given)
    assert not hub.repos


def test_a_dry_run_asks_nobody(hub, arguments, messages):
    run_training("sd", arguments(*UPLOAD, "--async_upload", "--dry_run"))
    assert not hub.requests
    assert "model me/lora, while training goes on" in messages.text


@pytest.mark.parametrize("more", [(), ("--async_upload",)])
def test_failures_while_training_change_nothing_but_the_hub(hub, arguments, tmp_path, capfd, more):
    hub.failures["/commit/"] = (500, "out of order")
    main("sd", "network", argv=arguments(*UPLOAD, *more, "--save_every_n_steps", "2"))  # no exit: code 0
    said = capfd.readouterr().err
    assert said.count("is not uploaded: HTTP 500, out of order; the training goes on") == 3
    assert said.count("warning: last-step00000002.safetensors is not uploaded") == 1
    assert f"by hand: hf upload me/lora {tmp_path / 'out' / 'last.safetensors'} last.safetensors" in said
    assert [event["event"] for event in events(tmp_path / "out")].count("upload_failed") == 3
    assert hub.files() == {}
    assert TOKEN not in said


def test_saved_options_have_no_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main("sd", "network", argv=["--output_config", *UPLOAD])
    text = (tmp_path / "config.toml").read_text()
    assert "me/lora" in text and TOKEN not in text


# states on the hub


STATES = ("--save_state_on_train_end", "--save_state_to_huggingface")


def with_value(arguments, flag, value):
    changed = list(arguments)
    changed[changed.index(flag) + 1] = str(value)
    return changed


@pytest.mark.parametrize("more", [(), ("--async_upload",)])
def test_going_on_from_the_hub_is_never_having_stopped(hub, arguments, tmp_path, more):
    straight = run_training("sd", with_value(arguments(folder=tmp_path / "straight"), "--max_train_steps", 6))
    first = arguments(*UPLOAD, *STATES, *more, "--huggingface_path_in_repo", "runs", folder=tmp_path / "first")
    run_training("sd", with_value(first, "--max_train_steps", 2))
    revision = hub.repos["models/me/lora"][-1][0]
    run_training("sd", with_value(first, "--max_train_steps", 3))  # another state under the same name
    shutil.rmtree(tmp_path / "first")
    for number, named in enumerate((f"me/lora/runs/last-state:{revision}:model", "me/lora/runs/last-state")):
        folder = tmp_path / str(number)
        given = arguments("--resume", named, "--resume_from_huggingface", "--huggingface_token", TOKEN, folder=folder)
        outcome = run_training("sd", with_value(given, "--max_train_steps", 6))
        (begun,) = [event for event in events(folder / "out") if event["event"] == "resume"]
        assert begun["step"] == 2 + number
        assert outcome.losses == straight.losses[2 + number :]
        ours, theirs = (load_file(place / "out" / "last.safetensors") for place in (folder, tmp_path / "straight"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("me/lora", "expected owner/repository/folder"),
        ("me/lora/x:main:model:more", "expected owner/repository/folder"),
        ("me/lora/x:main:modle", "expected owner/repository/folder"),
        ("me/lora/runs/nothing", "no such folder in me/lora; it has states in runs/last-state"),
        ("me/lora/runs/last", "no such folder in me/lora; it has states in runs/last-state"),
        ("me/nothing/runs/last-state", "cannot be fetched from the hub: HTTP 404"),
        ("me/lora/runs/last-state:nowhere", "cannot be fetched from the hub: HTTP 404"),
    ],
)
def test_states_that_are_not_there(hub, given, text):
    hub.make("models/me/lora")
    content = base_lines({"runs/last-state/state.json": b"{}", "runs/last-state/weights.safetensors": b""})
    hub.add("models/me/lora", content)
    with pytest.raises(UserError) as error:
        download_state(given, options())
    assert text in str(error.value) and str(error.value).startswith(f"--resume = {given!r}")


def base_lines(files):
    import base64

    pairs = ((path, base64.b64encode(data).decode()) for path, data in files.items())
    return [{"key": "file", "value": {"path": path, "content": data}} for path, data in pairs]


def test_only_the_state_is_fetched(hub, tmp_path):
    hub.make("models/me/lora")
    inside = {"a[1]/x-state/state.json": b"{}", "a[1]/x-state-2/state.json": b"{}", "big.safetensors": b"0"}
    hub.add("models/me/lora", base_lines(inside))
    folder = download_state("me/lora/a[1]/x-state", options())
    assert [path.name for path in folder.iterdir()] == ["state.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["x-state"]


def test_what_does_nothing_alone_says_so():
    from library.options.conditions import condition_warnings

    given = ["--async_upload", "--save_state_to_huggingface", "--huggingface_token", TOKEN, "--wandb_api_key", TOKEN]
    said = list(condition_warnings(parse_options("sd", "network", given)))
    assert len(said) == 4 and all("has no effect: it needs --" in text for text in said)
    assert not any(TOKEN in text for text in said)


STUCK = """
import sys
sys.path[:0] = sys.argv[1:3]
from support.hub import StandIn
import threading, os
hub = StandIn()
hub.gate.clear()
os.environ["HF_ENDPOINT"] = hub.url
from library.base.logs import logger
real = logger.info
def info(text, *rest):
    real(text, *rest)
    if text.startswith("waiting for"):
        print("<waiting>", flush=True)
logger.info = info
from library.train_util import main
main("sd", "network", argv=sys.argv[3:])
"""


@pytest.mark.e2e
def test_a_signal_while_waiting_ends_at_once(arguments, tmp_path):
    """The upload is stuck for ever; what is lost is named, and the run's results are there."""
    script = write(tmp_path / "script.py", STUCK)
    command = [sys.executable, str(script), str(ROOT), str(ROOT / "tests"), *arguments(*UPLOAD, "--async_upload")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        line = process.stdout.readline()
        if line != "<waiting>\n":
            process.kill()
            raise AssertionError(process.stderr.read())
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert time.monotonic() - started < 5
    assert "last.safetensors (given up); by hand: hf upload me/lora" in said
    assert (tmp_path / "out" / "last.safetensors").is_file()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert TOKEN not in said
