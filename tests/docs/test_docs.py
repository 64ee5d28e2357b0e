"""Commands, files and links that the documentation shows."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from library import config_util
from library.base.text import PROMPT_OPTIONS
from library.config_util import read_config, resolve_datasets
from library.families import FAMILIES
from library.inference import make_inference_parser, parse_inference
from library.optim.registry import OPTIMIZERS
from library.options import pending
from library.options.conflicts import CONFLICTS
from library.options.schedule import READS, SCHEDULE_FLAGS
from library.train_util import (
    _cache_command_line,
    cache_parser,
    find_problems,
    load_family,
    make_options,
    make_parser,
    parse_options,
)
from tools import compare_steps, dataset_report
from tools.dev import model_matrix, options_page

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "tests/golden/README.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {
    "train_network.py": "sd",
    "sdxl_train_network.py": "sdxl",
    "sd3_train_network.py": "sd3",
    "hunyuan_image_train_network.py": "hunyuan_image",
    "flux_train_network.py": "flux",
    "lumina_train_network.py": "lumina",
    "anima_train_network.py": "anima",
}
pytestmark = pytest.mark.docs


def blocks(language):
    for page in PAGES:
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            if found[1] == language:
                yield page.name, found[2]


def commands():
    for page, text in blocks(""):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"]:
                yield page, words[2:]
            elif words[:1] == ["python"] and (
                words[1].startswith(("tools/", "quickstart")) or words[1].endswith("_minimal_inference.py")
            ):
                yield page, words[1:]


COMMANDS = list(commands())


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_parse(page, words):
    script, *arguments = words
    assert (ROOT / script).is_file()
    if script in SCRIPTS:
        options = parse_options(
            SCRIPTS[script], "network", [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
        )
        assert find_problems(SCRIPTS[script], "network", options) == []
    elif script.startswith("tools/cache_"):
        _cache_command_line("flux").parse(arguments)
    elif script == "tools/dataset_report.py":
        dataset_report.setup_parser().parse_args(arguments)
    elif script == "tools/compare_steps.py":
        compare_steps.setup_parser().parse_args(arguments)
    elif script.endswith("_minimal_inference.py"):
        assert not list(parse_inference(script.removesuffix("_minimal_inference.py"), arguments).problems())
    elif script == "quickstart.py":
        assert arguments in ([], ["test"], ["install"])


@pytest.mark.parametrize(("page", "text"), list(blocks("toml")), ids=lambda value: value.splitlines()[0][:30])
def test_dataset_files_resolve(page, text, tmp_path):
    (tmp_path / "dataset.toml").write_text(text)
    assert resolve_datasets(read_config(tmp_path / "dataset.toml"), {})


CONFIGURATIONS = {
    "flux_lora": "flux",
    "chroma_lora": "flux",
    "sd15_lora": "sd",
    "sdxl_lora": "sdxl",
    "sd3_lora": "sd3",
    "lumina_lora": "lumina",
    "anima_lora": "anima",
    "hunyuan_image_lora": "hunyuan_image",
}
DATASETS = {"dataset"}


def test_every_example_file_is_looked_at():
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} == set(CONFIGURATIONS) | DATASETS


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_example_datasets_resolve(name):
    assert resolve_datasets(read_config(ROOT / "configs" / f"{name}.toml"), {})


@pytest.mark.parametrize(("name", "family"), CONFIGURATIONS.items())
def test_configurations_load(name, family):
    options = parse_options(
        family, "network", ["--config_file", str(ROOT / "configs" / f"{name}.toml"), "--strict_config"]
    )
    assert find_problems(family, "network", options) == []
    assert resolve_datasets(read_config(ROOT / options.value("dataset_config")), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["networks.lora", "networks.lora_flux"])
def test_network_arguments_are_listed(name):
    text = (ROOT / "docs" / "training_lora.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### Arguments of {name}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    shown = {word for cell in re.findall(r"^\| (`.*?) \|", section, re.M) for word in cell.replace("`", "").split()}
    shown |= set(re.findall(r"`(dropout)`", section))
    known = {argument.name for argument in importlib.import_module(name).TABLE.arguments}
    if name == "networks.lora_flux":
        known -= {"conv_dim", "conv_alpha"}  # FLUX has no such layers
    assert shown == known


def test_keys_of_datasets_are_listed_with_their_levels():
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \| ((?:[GDS] ?)+)\|", text, re.M))
    assert {name: levels.replace(" ", "") for name, levels in shown.items()} == {
        name: key.levels for name, key in config_util._ALL.items()
    }


def flags_of_section(title):
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return set(re.findall(r"`--(\w+)`", section))


def test_flags_without_effect_are_listed():
    silent = {name for reasons in pending.NO_EFFECT.values() for name in reasons}
    silent |= {*SCHEDULE_FLAGS, "use_8bit_adam"}
    named = {"ae", "weighting_scheme", "optimizer_type", "lr_scheduler"}
    assert flags_of_section("Flags without effect") - named == silent


def test_what_is_not_there_yet_is_listed():
    refused = set(pending.PENDING_FLAGS)
    assert flags_of_section("Not there yet") - {"compile"} == refused


def test_every_optimizer_and_schedule_is_described():
    text = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    shown = {word for cell in re.findall(r"^\| (`.*?) \|", text, re.M) for word in re.findall(r"`([\w:.]+)`", cell)}
    assert {entry.name for entry in OPTIMIZERS.values()} | set(READS) <= shown | {"adafactor"}


def test_flags_in_the_documentation_exist():
    known = set()
    for family in FAMILIES:
        for task in load_family(family).tasks:
            known |= {flag for action in make_parser(family, task)._actions for flag in action.option_strings}
        for preset in load_family(family).presets:
            known |= {flag for action in make_parser(family, "full", preset)._actions for flag in action.option_strings}
    known |= {flag for action in cache_parser()._actions for flag in action.option_strings}
    for family in (family for family in FAMILIES if load_family(family).inference):
        known |= {flag for action in make_inference_parser(family)._actions for flag in action.option_strings}
    known |= {f"--{name}" for name in (*PROMPT_OPTIONS, "c", "m", "num_processes", "plot", "check", "help", "torch")}
    for page in PAGES:
        for flag in re.findall(r"`(--\w+)", page.read_text(encoding="utf-8")):
            assert flag in known, f"{page.name}: {flag}"


def test_the_table_of_models_is_what_the_families_say():
    text = model_matrix.PAGE.read_text(encoding="utf-8")
    assert text == model_matrix.page(text), "run tools/dev/model_matrix.py"
    trained = {name for name in FAMILIES if "network" in load_family(name).available_tasks}
    assert trained == set(FAMILIES)
    for script in re.findall(r"`(\w+\.py)`", model_matrix.table()):
        assert (ROOT / script).is_file(), script


def test_the_page_of_options_is_what_the_options_say():
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page(), "run tools/dev/options_page.py"


@pytest.mark.parametrize(
    ("name", "beside", "text"), CONFLICTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_options_that_exclude_each_other_do(name, beside, text):
    """What the page says of an option is what the checks find."""
    files = {"pretrained_model_name_or_path": "m", "dataset_config": None, "train_data_dir": "d", "resolution": "64"}
    base = {**files, "output_dir": "o"}
    value = {"adaptive_noise_scale": 0.1, "v_pred_like_loss": 0.1, "face_crop_aug_range": "1,2", "token_warmup_step": 5}
    value |= {"sample_every_n_steps": 2, "sample_every_n_epochs": 2}
    given = {name: value.get(name, True), **beside}
    found = find_problems("sd", "network", make_options("sd", "network", {**base, **given}))
    named = {f"--{name}", *(f"--{other}" for other in beside), "--sample_prompts"}
    assert [problem for problem in found if problem.where in named], text
    assert find_problems("sd", "network", make_options("sd", "network", base)) == []
