"""Samples of a training: occasions, caches, checks, trackers."""

import pytest
from PIL import Image
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.tracking.trackers import Moment
from library.training import outputs, run, setting


@pytest.fixture
def arguments(inputs, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 7 --s 2 --l 2 --n blurry\na dog --w 96 --h 64 --s 2\n")

    def make(family, *more, out="out"):
        given = network_arguments(family, inputs, tmp_path, dataset_toml(tmp_path, inputs, batch_size=5), *more)
        given[given.index("--output_dir") + 1] = str(tmp_path / out)
        return [*given, "--sample_prompts", str(prompts), "--learning_rate", "1e-2"]

    return make


def names(folder):
    return sorted({path.name.split("_2")[0].removesuffix(".png") for path in (folder / "sample").iterdir()})


def pixels(folder):
    return {
        path.name.split("_2")[0]: Image.open(path).tobytes()
        for path in (folder / "sample").iterdir()
        if "sheet" not in path.name
    }


def test_epochs_win_over_steps_and_say_so(arguments, tmp_path, messages):
    more = ("--sample_every_n_steps", "1", "--sample_every_n_epochs", "1", "--max_train_epochs", "2")
    run_training("sd", arguments("sd", *more, "--max_train_steps", "99"))
    assert names(tmp_path / "out") == [
        f"last_e00000{epoch}_{what}" for epoch in (1, 2) for what in ("00", "01", "sheet")
    ]
    (warning,) = [text for text in messages.messages if "--sample_every_n_steps" in text]
    assert "--sample_every_n_epochs" in warning


def test_at_first_and_by_steps(arguments, tmp_path, messages):
    run_training(
        "flux", arguments("flux", "--sample_at_first", "--sample_every_n_steps", "2", "--max_train_steps", "3")
    )
    assert names(tmp_path / "out") == [
        f"last_{when}_{what}" for when in ("000002", "e000000") for what in ("00", "01", "sheet")
    ]
    (line,) = [text for text in messages.messages if text.startswith("samples 000002")]
    assert "2 images in" in line and line.endswith("last_000002_sheet.png")


def test_cached_text_gives_the_same_samples(arguments, tmp_path, monkeypatch):
    """Bit for bit, although the encoders are gone by then."""
    sessions = []
    real = run.build_session
    monkeypatch.setattr(run, "build_session", lambda *given: sessions.append(real(*given)) or sessions[-1])
    more = ("--network_train_unet_only", "--sample_every_n_steps", "2", "--max_train_steps", "2")
    run_training("flux", arguments("flux", *more, out="live"))
    run_training("flux", arguments("flux", *more, "--cache_text_encoder_outputs", out="cached"))
    (live, _), (cached, _) = sessions
    assert all(live.components.text_encoders) and cached.components.text_encoders == [None, None]
    assert len(pixels(tmp_path / "live")) == 2
    assert pixels(tmp_path / "live") == pixels(tmp_path / "cached")


@pytest.mark.parametrize(
    ("prompts", "more", "text"),
    [
        ("a --ss ddmi", (), "line 1: --ss = 'ddmi': expected one of ddim"),
        ("a --w 0", (), "line 1: --w 0"),
        ("a --ss lms", ("--zero_terminal_snr", "--v_parameterization"), "those that can follow --zero_terminal_snr"),
        ("a", ("--zero_terminal_snr", "--v_parameterization", "--sample_sampler", "lms"), "--sample_sampler = 'lms'"),
    ],
)
def test_prompts_are_checked_before_anything_loads(arguments, tmp_path, monkeypatch, prompts, more, text):
    monkeypatch.setattr(run, "build_session", lambda *given: pytest.fail("loaded"))
    given = arguments("sd", "--sample_every_n_steps", "2", *more)
    (tmp_path / "prompts.txt").write_text(prompts)
    with pytest.raises(UserError) as error:
        run_training("sd", given)
    assert text in str(error.value)


def test_negative_intervals_are_refused(arguments):
    with pytest.raises(UserError, match="--sample_every_n_steps = -2: must be at least 0"):
        run_training("sd", arguments("sd", "--sample_every_n_steps", "-2"))


class Listener:
    """Stands for trackers: keeps what it is told."""

    def __init__(self):
        self.told = []

    def image(self, path, prompt, index, moment):
        assert path.exists()
        self.told.append((path.name.split("_2")[0], prompt, index, moment))


def test_trackers_are_shown_every_image(arguments, monkeypatch):
    """Of averaged weights that are looked at too, the trackers see nothing: a prompt has one row of images."""
    listener = Listener()
    real = setting.Setting.__init__
    monkeypatch.setattr(
        setting.Setting, "__init__", lambda self, **given: real(self, **{**given, "trackers": listener})
    )
    averaged = ("--ema_decay", "0.9", "--ema_samples", "both")
    run_training("sd", arguments("sd", "--sample_every_n_steps", "2", "--max_train_steps", "2", *averaged))
    assert listener.told == [
        ("last_000002_00", "a cat", 0, Moment(2, 1)),
        ("last_000002_01", "a dog", 1, Moment(2, 1)),
    ]


def test_without_trackers_nobody_is_told():
    class Bare:
        trackers = None

    assert outputs._tracker_hook(Bare, None, None) is None
