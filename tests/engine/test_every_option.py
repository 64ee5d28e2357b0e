"""Every option of the LoRA scripts changes something that can be seen from outside.

A row says what an option is set to, beside what, and where the difference shows. Options that a test of their own
covers name it; an option without a row fails the suite.
"""

import ast
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.option_rows import ELSEWHERE, EXCEPTIONS, OF_FAMILIES, ROWS
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, read_header, save_file_atomic
from library.families import FAMILIES
from library.optim.scaler import HalfGradScaler
from library.options.pending import NO_EFFECT
from library.options.precision import PrecisionOptions
from library.train_util import make_parser
from library.training import build, run

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("started_at", "finished_at", "session_id", "date", "hash")


def options_of(family):
    return {action.dest for action in make_parser(family, "network")._actions}


def test_every_option_has_its_row():
    shared = set(ROWS) | set(ELSEWHERE) | set(EXCEPTIONS)
    every = set()
    for family in FAMILIES:
        every |= (found := options_of(family))
        assert found - shared - set(OF_FAMILIES.get(family, ("", ()))[1]) == set(), f"{family}: these need a row"
    assert shared - every <= {name for family in NO_EFFECT.values() for name in family}
    assert not set(ROWS) & set(ELSEWHERE)


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_tests_of_families_speak_of_their_options(family):
    file, names = OF_FAMILIES[family]
    text = (ROOT / file).read_text()
    assert [name for name in names if name not in text] == []
    assert set(names) <= options_of(family)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_tests_elsewhere_exist_and_speak_of_the_option(name):
    file, _, test = ELSEWHERE[name].partition("::")
    text = (ROOT / file).read_text()
    if test:
        assert test in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    else:
        assert name in text


@pytest.fixture(scope="module", autouse=True)
def no_caches_stay(inputs):
    """Other files' tests count on photographs without caches beside them."""
    yield
    for pattern in ("*.npz", "*.safetensors"):
        for path in (inputs.folder / "data").rglob(pattern):
            path.unlink()


@pytest.fixture(scope="module")
def places(inputs, tmp_path_factory):
    """Files that rows name."""
    folder, data = tmp_path_factory.mktemp("places"), inputs.folder / "data"

    def folders(name, source):
        target = folder / name / "1_some"
        target.mkdir(parents=True)
        for file in sorted((data / source).iterdir()):
            shutil.copy(file, target)
        return folder / name

    def changed(model):
        path = folder / f"other_{model}.safetensors"
        tensors = {name: t * 1.5 if t.ndim > 1 else t for name, t in load_file(inputs.model(model)).items()}
        save_file_atomic(tensors, path, read_header(inputs.model(model))[1] or {})
        return path

    def adapter(dim):
        toml = dataset_toml(folder, inputs)
        more = ("--network_dim", str(dim), "--output_dir", str(folder), "--output_name", f"adapter{dim}")
        run_training("flux", [*network_arguments("flux", inputs, folder, toml), *more, "--learning_rate", "1e-2"])
        return folder / f"adapter{dim}.safetensors"

    bad = folders("bad", "img")
    (bad / "1_some" / "zero.png").write_bytes(b"")
    (bad / "1_some" / "zero.txt").write_text("nothing")
    faces = folders("faces", "img")
    for file in (faces / "1_some").glob("*.png"):
        file.rename(file.with_name(f"{file.stem}_40_40_30_30{file.suffix}"))
        (file.with_suffix(".txt")).rename(file.with_name(f"{file.stem}_40_40_30_30.txt"))
    for file in [*(faces / "1_some").glob("*.jpg"), *(faces / "1_some").glob("*.webp")]:
        file.unlink()
    (folder / "meta.json").write_text(
        json.dumps({str(path): {"caption": path.stem} for path in sorted((data / "img").glob("*.png"))})
    )
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    (folder / "other").mkdir()
    found = {
        "other_model": changed("flux1_dev"),
        "other_clip": changed("clip_l"),
        "other_t5": changed("t5xxl"),
        "other_ae": changed("ae"),
        "other_vae": changed("sd15"),
        "adapter": adapter(4),
        "small_adapter": adapter(2),
        "folders": folders("folders", "img"),
        "bad_folders": bad,
        "face_folders": faces,
        "alpha_folders": folders("alpha", "alpha"),
        "reg": folders("reg", "reg"),
        "masks": data / "mask",
        "images": data / "img",
        "metadata": folder / "meta.json",
        "picture": data / "img" / "cat.png",
        "prompts": folder / "prompts.txt",
        "other_toml": dataset_toml(folder / "other", inputs, batch_size=2),
    }
    return {name: str(path) for name, path in found.items()}


class Said(logging.Handler):
    """What a run said, without times and places."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def run_row(row, flags, inputs, places, folder):
    """A run, what it said, and what stopped it."""
    folder.mkdir(parents=True)
    toml = dataset_toml(folder, inputs, subset=row.subset, dataset=row.dataset)
    own = {name: str(folder / name) for name in ("elsewhere", "logs", "record", "nowhere")}
    words = [word.format(**places, **own) if "{" in word else word for word in shlex.split(flags)]
    arguments = [*network_arguments(row.family, inputs, folder, toml), "--max_train_steps", "2", *words]
    if "none" in arguments:  # the data is named by flags
        for _ in range(1 + arguments.count("none")):
            at = arguments.index("--dataset_config")
            del arguments[at : at + 2]
    handler, logger = Said(), logging.getLogger("diffusion_scripts")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        outcome, stopped = run_training(row.family, arguments), ""
    except UserError as error:
        outcome, stopped = None, str(error)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return folder, outcome, handler.texts, stopped


def view(shows, folder, outcome, said, stopped):
    """One side of a run."""
    if shows == "stopped":
        return stopped
    assert not stopped, stopped
    return VIEWS[shows](folder, outcome, said)


def weights(folder):
    return load_file(folder / "out" / "last.safetensors")


def metadata(folder):
    entries = read_header(folder / "out" / "last.safetensors")[1]
    return {name: value for name, value in entries.items() if not name.endswith(TIMES)}


def files(folder):
    return sorted(
        ("_".join(path.name.split("_")[:2]) if path.suffix == ".png" else path.name, path.is_dir(), path.parent.name)
        for path in folder.rglob("*")
    )


def of_events(folder, kind, keep):
    return [{name: event[name] for name in keep} for event in events(folder / "out") if event["event"].startswith(kind)]


VIEWS = {
    "losses": lambda folder, outcome, said: outcome.losses,
    "rates": lambda folder, outcome, said: [
        {name: value for name, value in event.items() if name.startswith("lr/")} for event in events(folder / "out")
    ],
    "weights": lambda folder, outcome, said: {name: t.float().tolist() for name, t in weights(folder).items()},
    "average": lambda folder, outcome, said: {
        name: t.tolist() for name, t in load_file(folder / "out" / "last-ema.safetensors").items()
    },
    "shapes": lambda folder, outcome, said: {name: tuple(t.shape) for name, t in weights(folder).items()},
    "dtypes": lambda folder, outcome, said: {t.dtype for t in weights(folder).values()},
    "metadata": lambda folder, outcome, said: metadata(folder),
    "files": lambda folder, outcome, said: files(folder),
    "logs": lambda folder, outcome, said: [
        str(path.relative_to(folder)).split("2026")[0] + path.name[:6]
        for path in sorted(folder.rglob("*"))
        if "logs" in path.parts or path.name.startswith("events")
    ],
    "said": lambda folder, outcome, said: [text for text in said if not text.startswith("plan")],
    "plan": lambda folder, outcome, said: [
        line for line in next(text for text in said if text.startswith("plan")).splitlines() if str(folder) not in line
    ],
    "events": lambda folder, outcome, said: of_events(folder, "step", ("step", "epoch")),
    "validation": lambda folder, outcome, said: of_events(folder, "validation", ("step", "loss")),
    "pictures": lambda folder, outcome, said: [
        p.read_bytes() for p in sorted((folder / "out" / "sample").glob("*.png"))
    ],
    "recorded": lambda folder, outcome, said: sorted(p.name for p in (folder / "record").glob("*")),
}


@pytest.fixture(scope="module")
def plain(inputs, places, tmp_path_factory):
    """What runs without the option show; rows share them."""
    seen = {}

    def run_once(row):
        key = row.family, row.beside, row.subset, row.dataset
        if key not in seen:
            seen[key] = run_row(row, row.beside, inputs, places, tmp_path_factory.mktemp("plain") / "run")
        return view(row.shows, *seen[key])

    return run_once


@pytest.mark.parametrize("name", sorted(ROWS))
def test_an_option_changes_something(name, inputs, places, plain, tmp_path):
    row = ROWS[name]
    given = run_row(row, f"{row.beside} {row.given}", inputs, places, tmp_path / "run")
    assert plain(row) != view(row.shows, *given)


def test_batches_of_caches(inputs, tmp_path, monkeypatch):
    """How many images and captions the encoders get at a time."""
    sizes = {"images": [], "texts": []}
    from library.modules.vae import AutoencoderLatents
    from library.strategy_flux import FluxTokenizeStrategy

    encode, tokenize = AutoencoderLatents.encode, FluxTokenizeStrategy.tokenize
    monkeypatch.setattr(
        AutoencoderLatents,
        "encode",
        lambda self, vae, images: sizes["images"].append(len(images)) or encode(self, vae, images),
    )
    monkeypatch.setattr(
        FluxTokenizeStrategy, "tokenize", lambda self, texts: sizes["texts"].append(len(texts)) or tokenize(self, texts)
    )
    more = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")
    for images, texts in ((1, 1), (3, 4)):
        sizes["images"], sizes["texts"] = [], []
        folder = tmp_path / str(images)
        folder.mkdir()
        arguments = network_arguments("flux", inputs, folder, dataset_toml(folder, inputs), *more)
        run_training("flux", [*arguments, "--vae_batch_size", str(images), "--text_encoder_batch_size", str(texts)])
        assert max(sizes["images"]) == images and max(sizes["texts"]) == texts


def test_settings_reach_the_compiler(inputs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(build, "compile_blocks", lambda blocks, **settings: seen.append(settings))
    arguments = network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--compile")
    more = ("--compile_mode", "max-autotune", "--compile_cache_size_limit", "7", "--compile_fullgraph")
    run_training("flux", [*arguments, *more])
    assert seen[0]["mode"] == "max-autotune" and seen[0]["cache_size_limit"] == 7 and seen[0]["fullgraph"]


def test_flags_of_the_back_end(monkeypatch):
    for place, name in ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "benchmark")):
        before = getattr(place, name)
        try:
            run.set_backend_flags(PrecisionOptions())
            assert getattr(place, name) == before
            run.set_backend_flags(PrecisionOptions(cuda_allow_tf32=True, cuda_cudnn_benchmark=True))
            assert getattr(place, name)
        finally:
            setattr(place, name, before)


def test_waiting_times_reach_the_processes(inputs, tmp_path, monkeypatch):
    seen = []
    original = run.start_processes
    monkeypatch.setattr(
        run, "start_processes", lambda *given, timeout=None: seen.append(timeout) or original(*given, timeout=timeout)
    )
    run_training(
        "flux", [*network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs)), "--ddp_timeout", "7"]
    )
    assert seen == [7]


def test_a_wrong_version_is_named(inputs, tmp_path):
    arguments = network_arguments("sd", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--v2")
    with pytest.raises(UserError, match="--v2 was given, but this is a Stable Diffusion 1.x checkpoint"):
        run_training("sd", arguments)


def test_the_scaler_takes_gradients_in_half_precision():
    """What --full_fp16 needs beyond --mixed_precision fp16, which needs a GPU."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = HalfGradScaler("cpu", init_scale=16.0)
    scaler.scale((weight.float() * 2).sum()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0] * 4
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [0.0] * 4


@pytest.mark.e2e
def test_how_messages_are_printed(inputs, tmp_path):
    """Level, form and place of what a script says."""
    base = network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--dry_run")

    def said(*more):
        command = [sys.executable, str(ROOT / "flux_train_network.py"), *base, *more]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    assert "stopped before training" in said()
    assert "stopped before training" not in said("--console_log_level", "ERROR")
    stamped, plain = tmp_path / "stamped.txt", tmp_path / "plain.txt"
    assert "stopped before training" not in said("--console_log_file", str(stamped))
    said("--console_log_file", str(plain), "--console_log_simple")
    assert "INFO    --dry_run: stopped before training" in stamped.read_text()
    assert "\n--dry_run: stopped before training" in plain.read_text()


def test_states_by_time(inputs, tmp_path, monkeypatch):
    """A minute passes with every look at the clock."""
    minutes = iter(range(10_000))
    monkeypatch.setattr(build.time, "monotonic", lambda: 60.0 * next(minutes))
    arguments = network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs))
    run_training("flux", [*arguments, "--save_state_every_n_minutes", "1"])
    assert [path.name for path in (tmp_path / "out").glob("*-state")]
