"""The command lines of all training scripts: complete, frozen, described, fast."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from library.families import FAMILIES
from library.options.inference import InferenceModelOptions, InferenceOptions
from library.options.tasks import TASKS
from library.options.values import options_of
from library.train_util import load_family, make_parser
from tools.dev import freeze_flags

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = json.loads((ROOT / "tests/golden/cli_training.json").read_text(encoding="utf-8"))

# flag -> (property, why ours differs)
ALLOWED = {
    # an alias of --caption_extension here, so its default is that flag's
    "--caption_extention": {"default"},
    # no script of ours changes its default: lllite_old is the same script
}

# later than the reference's state: flag -> [type, default], and the scripts that have it
LATER = {
    "--compile": (["switch", False], "all"),
    "--compile_backend": (["str", "inductor"], "all"),
    "--compile_mode": (["str", "default"], "all"),
    "--compile_dynamic": (["str", None], "all"),
    "--compile_fullgraph": (["switch", False], "all"),
    "--compile_cache_size_limit": (["int", None], "all"),
    "--cuda_allow_tf32": (["switch", False], "all"),
    "--cuda_cudnn_benchmark": (["switch", False], "all"),
    "--unsloth_offload_checkpointing": (["switch", False], "all"),
    "--strict_config": (["switch", False], "all"),
    "--dry_run": (["switch", False], "all"),
    "--record_steps": (["str", None], "all"),
    "--replay_steps": (["str", None], "all"),
    "--train_inpainting": (
        ["switch", False],
        ["train_network", "sdxl_train_network", "train_db", "sdxl_train", "fine_tune", "train_textual_inversion"],
    ),
    "--show_timesteps": (["str", None], ["flux_train_network", "sd3_train", "lumina_train", "anima_train_network"]),
    "--show_timesteps_offset": (["float", 0.0], ["flux_train", "hunyuan_image_train_network"]),
    "--qwen_image_vae_2d": (["switch", False], ["anima_train_network", "anima_train"]),
    "--prompts_file": (["str", None], ["train_leco", "sdxl_train_leco"]),
    "--max_denoising_steps": (["int", 40], ["train_leco", "sdxl_train_leco"]),
    "--leco_denoise_guidance_scale": (["float", 3.0], ["train_leco", "sdxl_train_leco"]),
    "--network_dim": (["int", 4], ["train_leco", "sdxl_train_leco"]),
    "--network_module": (["str", "networks.lora"], ["train_leco", "sdxl_train_leco"]),
    "--cond_emb_dim": (["int", 32], ["anima_train_control_net_lllite"]),
    "--lllite_cond_dim": (["int", 64], ["anima_train_control_net_lllite"]),
    "--lllite_cond_resblocks": (["int", 1], ["anima_train_control_net_lllite"]),
    "--lllite_use_aspp": (["switch", False], ["anima_train_control_net_lllite"]),
    "--lllite_mlp_dim": (["int", 64], ["anima_train_control_net_lllite"]),
    "--lllite_target_layers": (["str", "self_attn_q"], ["anima_train_control_net_lllite"]),
    "--lllite_dropout": (["float", None], ["anima_train_control_net_lllite"]),
    "--lllite_multiplier": (["float", 1.0], ["anima_train_control_net_lllite"]),
    "--network_weights": (["str", None], ["anima_train_control_net_lllite"]),
    "--allow_missing_captions": (["switch", False], ["train_network", "flux_train_network", "fine_tune"]),
    "--vae_sample": (["switch", False], ["train_network", "flux_train_network", "sdxl_train"]),
    "--validate_at_first": (["switch", False], ["train_network", "flux_train_network"]),
}


def _flags(parser):
    return {flag: action for action in parser._actions for flag in action.option_strings}


def _kind(action):
    return "switch" if type(action).__name__ == "_StoreTrueAction" else action.type.__name__


@pytest.fixture(scope="module")
def scripts():
    return {path.stem: _flags(freeze_flags.load_script(path).setup_parser()) for path in freeze_flags.script_paths()}


@pytest.mark.parametrize("index", range(len(REFERENCE["scripts"])), ids=REFERENCE["scripts"])
def test_every_flag_of_the_reference(scripts, index):
    ours = scripts[Path(REFERENCE["scripts"][index]).stem]
    wrong, compared = [], 0
    for flag, definitions in REFERENCE["flags"].items():
        for kind, default, choices, nargs, where in definitions:
            if where != "all" and index not in where:
                continue
            compared += 1
            action = ours.get(flag)
            if action is None:
                wrong.append(f"{flag} is missing")
                continue
            theirs = {"type": kind, "default": default, "choices": choices, "nargs": nargs}
            found = {
                "type": _kind(action),
                "default": action.default,
                "choices": list(action.choices) if action.choices else None,
                "nargs": action.nargs or None,
            }
            wrong += [
                f"{flag} {name}: {found[name]!r}, should be {value!r}"
                for name, value in theirs.items()
                if found[name] != value and name not in ALLOWED.get(flag, ())
            ]
    assert not wrong
    assert compared > 150


@pytest.mark.parametrize("flag", LATER)
def test_later_flags(scripts, flag):
    (kind, default), where = LATER[flag]
    for name in [name for name in scripts if "inference" not in name] if where == "all" else where:
        action = scripts[name][flag]
        assert (_kind(action), action.default) == (kind, default), name


def test_frozen_flags():
    """After a wanted change: python tools/dev/freeze_flags.py"""
    assert freeze_flags.differences() == []


def test_all_scripts_of_the_family_table_exist(scripts):
    lines = {(family, task) for family in FAMILIES for task in load_family(family).tasks}
    covered = set()
    for path in freeze_flags.script_paths():
        module = freeze_flags.load_script(path)
        if not hasattr(module, "TASK"):  # makes images, trains nothing
            continue
        covered.add((module.FAMILY, module.TASK))
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60 and "__main__" in text
    assert covered == lines
    assert set(scripts) >= {"train_controlnet", "sdxl_train_control_net_lllite_old", "train_db", "fine_tune"}


def _all_groups():
    groups = set()
    for name in FAMILIES:
        family = load_family(name)
        for task in family.tasks:
            for preset in (None, *family.presets) if task == "full" else (None,):
                groups.update(family.command_line(task, preset).groups)
        if family.inference is not None:
            groups.update((*family.inference.option_groups, InferenceOptions, InferenceModelOptions))
    return sorted(groups, key=lambda group: group.__name__)


@pytest.mark.parametrize("group", _all_groups(), ids=lambda group: group.__name__)
def test_groups_are_small_frozen_and_described(group):
    assert is_dataclass(group) and group.__dataclass_params__.frozen and all(f.kw_only for f in fields(group))
    assert 0 < len(fields(group)) < 25
    assert group.__doc__.strip().splitlines()[0]
    for option in options_of([group])[group]:
        assert option.help.strip() and option.help.isascii() and not option.help.endswith("."), option.name


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_defaults_and_hidden_names_exist(family):
    record = load_family(family)
    for task in record.tasks:
        line = record.command_line(task)
        offered = {option.name for options in options_of(line.groups).values() for option in options}
        named = set(record.task_defaults.get(task, ())) | set(record.task_choices.get(task, ()))
        named |= record.task_hidden.get(task, set()) | set(TASKS[task].defaults) | set(TASKS[task].hidden)
        assert named - offered <= {"fp8_base_unet", "initial_epoch"} | set(record.hidden), task
    everywhere = {
        option.name
        for task in record.tasks
        for options in options_of(record.command_line(task).groups).values()
        for option in options
    }
    assert set(record.defaults) | set(record.choices) | record.hidden <= everywhere
    assert set(record.tracker_names) == record.tasks


def test_available_families_name_their_parts():
    for family in map(load_family, FAMILIES):
        references = (family.inspect, family.load, family.strategies, family.model_spec, family.default_network)
        assert all(references) if family.available_tasks else not any(references), family.name
        assert family.available_tasks <= family.tasks


def test_help_is_complete(scripts):
    text = make_parser("flux", "network", prog="flux_train_network.py").format_help()
    assert "Network: the adapter that is trained" in text
    assert "--discrete_flow_shift X" in text and "(default: 3.0)" in text
    assert "with %: a share" in " ".join(text.split()) and "%%" not in text


_IMPORTS = """
import contextlib, io, runpy, sys
heavy = {"torch", "numpy", "diffusers", "transformers", "accelerate", "PIL", "safetensors", "toml", "einops"}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        assert error.code in (0, None), script
    flags = ("--pretrained_model_name_or_path", "--ckpt_path", "--dit")
    assert any(flag in out.getvalue() for flag in flags), script
    loaded = heavy & set(sys.modules)
    assert not loaded, (script, loaded)
print("light")
"""


def test_help_loads_nothing_heavy():
    paths = [str(path) for path in freeze_flags.script_paths()]
    result = subprocess.run(
        [sys.executable, "-c", _IMPORTS, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert result.stdout.strip() == "light", result.stderr
