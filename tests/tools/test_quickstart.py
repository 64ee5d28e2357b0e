"""The quickstart: what it installs when, and the files it trains on."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import quickstart
from library.config_util import read_config, resolve_datasets
from library.data.buckets import Bucketing
from library.data.build import scan
from library.data.records import ScanRules
from library.train_util import find_problems, parse_options
from tools import quickstart_assets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    quickstart_assets.main([str(folder)])
    return folder


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A `.venv` with an interpreter in it, not yet installed into."""
    monkeypatch.setattr(quickstart, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(quickstart, "MARKER", tmp_path / "installed.txt")
    python = quickstart.environment_python()
    python.parent.mkdir()
    python.touch()
    return tmp_path


@pytest.fixture
def pip(monkeypatch):
    """The pip commands that an installation gives; they do nothing."""
    given = []
    monkeypatch.setattr(quickstart, "run", lambda command, what, **_: given.append(command))
    monkeypatch.setattr(quickstart, "runs", lambda *_: True)
    return given


def mark(extras, torch="auto", index=None):
    quickstart.MARKER.write_text(f"{quickstart.fingerprint(torch, index)}\n{extras}\n")


def test_the_held_out_pictures_are_not_trained_on_in_other_crops(assets):
    plans = resolve_datasets(read_config(assets / "dataset.toml"), {})
    sets = scan(plans, source="dataset.toml", seed=1, step=16, rules=ScanRules())
    (train,), (held,) = (
        [{Path(record.key).stem.rsplit("_", 1)[0] for record in images.records} for images in which]
        for which in (sets.train, sets.validation)
    )
    assert len(sets.validation[0].records) == len(held) == 4
    assert not train & held
    assert len(sets.train[0].records) == 26


def test_every_photograph_has_a_caption_and_shapes_differ(assets):
    pictures = sorted((assets / "photographs").glob("*.jpg"))
    captions = [picture.with_suffix(".txt").read_text() for picture in pictures]
    assert len(pictures) == len(set(captions)) == 30
    plan = resolve_datasets(read_config(assets / "dataset.toml"), {})[0]
    assert len({Bucketing.from_plan(plan).place(Image.open(picture).size).bucket for picture in pictures}) >= 3


def test_the_tokenizers_know_every_caption(assets):
    from transformers import CLIPTokenizer, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(assets / "tokenizers" / "openai_clip-vit-large-patch14")
    t5 = T5Tokenizer.from_pretrained(assets / "tokenizers" / "google_t5-v1_1-xxl")
    for path in (assets / "photographs").glob("*.txt"):
        caption = path.read_text()
        assert clip.decode(clip(caption).input_ids, skip_special_tokens=True).replace(" ,", ",") == caption
        assert t5.decode(t5(caption).input_ids, skip_special_tokens=True) == caption


def test_its_options_are_sound(assets):
    options = parse_options("flux", "network", ["--config_file", str(assets / "config.toml"), "--strict_config"])
    assert find_problems("flux", "network", options) == []


def test_installs_once(environment):
    assert not quickstart.installed("train", "auto", None)
    mark("train")
    assert quickstart.installed("train", "auto", None)
    assert not quickstart.installed("test", "auto", None)
    assert not quickstart.installed("train", "auto", "https://example.org/cu130")


def test_the_extras_of_the_tests_hold_all_others(environment):
    mark("test")
    assert quickstart.installed("tensorboard,quickstart", "auto", None)


def test_installs_again_when_the_requirements_change(environment, monkeypatch):
    mark("train")
    root = environment / "root"
    root.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(quickstart, "ROOT", root)
    assert quickstart.installed("train", "auto", None)
    (root / "constraints.txt").write_text("torch==2.12.0\n")
    assert not quickstart.installed("train", "auto", None)


def test_only_the_latest_settings_count(environment, pip):
    for torch in ("auto", "torch==2.12.0"):
        quickstart.install("test", torch, None)
    assert len(pip) == 4
    assert quickstart.installed("test", "torch==2.12.0", None)
    assert not quickstart.installed("test", "auto", None)


def test_extras_add_up(environment, pip):
    quickstart.install("one", "auto", None)
    quickstart.install("two", "auto", None)
    assert quickstart.installed("one", "auto", None) and quickstart.installed("two", "auto", None)


def test_a_failed_installation_is_tried_again(environment, pip, monkeypatch):
    mark("test")

    def broken(command, what, **_):
        raise SystemExit("no network")

    monkeypatch.setattr(quickstart, "run", broken)
    with pytest.raises(SystemExit):
        quickstart.install("other", "torch==2.12.0", None)
    assert not quickstart.installed("test", "auto", None)


@pytest.mark.parametrize(("pip_found", "made"), [(True, 0), (False, 1)])
def test_an_environment_without_pip_is_mended(environment, pip, monkeypatch, pip_found, made):
    calls = []
    monkeypatch.setattr(quickstart, "runs", lambda *arguments: pip_found or "pip" not in arguments)
    monkeypatch.setattr(quickstart, "create_environment", lambda: calls.append(1))
    quickstart.install("test", "auto", None)
    assert len(calls) == made


def test_a_torch_of_ones_own_is_kept(environment, pip):
    quickstart.install("test", "none", None)
    (command,) = pip
    assert not any(word.startswith("torch") for word in command)
    assert command[command.index("-c") + 1] == str(environment / "constraints_without_torch.txt")


def test_torch_comes_first_and_from_the_index_given(environment, pip):
    quickstart.install("test", "auto", "https://example.org/cu130")
    first, second = pip
    assert first[-1] == quickstart.pinned("torch") and "https://example.org/cu130" in first
    assert "--index-url" not in second and second[-1] == ".[test]"


def test_installs_again_when_the_interpreter_is_gone(environment):
    mark("train")
    quickstart.environment_python().unlink()
    assert not quickstart.installed("train", "auto", None)


def test_a_torch_chosen_by_hand_is_not_constrained(environment):
    lines = Path(quickstart.other_constraints()).read_text().splitlines()
    assert not any(line.startswith("torch==") for line in lines)
    assert quickstart.pinned("numpy") in lines


def test_an_unsupported_python_without_a_better_one_is_told(monkeypatch):
    monkeypatch.setattr(quickstart, "SUPPORTED", ())
    with pytest.raises(SystemExit, match=r"needs Python 3\.11, 3\.12 or 3\.13"):
        quickstart.use_supported_python()


def test_a_failing_step_stops_with_its_name():
    with pytest.raises(SystemExit, match=r"making tea failed \(exit code 3\)"):
        quickstart.run([sys.executable, "-c", "raise SystemExit(3)"], "making tea")


def test_unknown_arguments_are_refused():
    command = [sys.executable, str(ROOT / "quickstart.py"), "install", "--no_such_flag"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--no_such_flag" in result.stderr
