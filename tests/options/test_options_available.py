"""What this version can do, and what it says about the rest."""

import logging
import sys
import tomllib
from types import SimpleNamespace

import pytest

from library import train_util
from library.base.errors import FeatureNotAvailable, UserError
from library.base.lazy import resolve
from library.families import FAMILIES
from library.options.config import ConfigOptions
from library.options.data import DatasetDict
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.pending import NO_EFFECT, PENDING_FLAGS, no_effect_reasons
from library.options.tasks import TASKS, Preset
from library.options.values import options_of
from library.train_util import find_problems, load_family, main, make_options, parse_options
from tools.dev import freeze_flags

SD = {"pretrained_model_name_or_path": "m.safetensors", "dataset_config": "d.toml", "output_dir": "out"}
FLUX = {**SD, "clip_l": "c", "t5xxl": "t", "ae": "a"}
LUMINA = {**SD, "gemma2": "g", "ae": "a"}
ANIMA = {**SD, "qwen3": "q", "vae": "v"}
HUNYUAN_IMAGE = {**SD, "text_encoder": "q", "byt5": "b", "vae": "v"}
COMPLETE = {
    "sd": SD,
    "sdxl": SD,
    "sd3": SD,
    "flux": FLUX,
    "lumina": LUMINA,
    "anima": ANIMA,
    "hunyuan_image": HUNYUAN_IMAGE,
}
# a changed value that fits each type; choices and special texts by name
SAMPLES = {bool: True, int: 3, float: 0.7, str: "x"}
SPECIAL = {"face_crop_aug_range": "1,2", "zero_stage": 1}

UNAVAILABLE = {
    ("anima_train", "anima", "full"),
    ("anima_train_control_net_lllite", "anima", "lllite"),
    ("fine_tune", "sd", "full"),
    ("flux_train", "flux", "full"),
    ("flux_train_control_net", "flux", "control_net"),
    ("hunyuan_image_train", "hunyuan_image", "full"),
    ("lumina_train", "lumina", "full"),
    ("sd3_train", "sd3", "full"),
    ("sdxl_train", "sdxl", "full"),
    ("sdxl_train_control_net", "sdxl", "control_net"),
    ("sdxl_train_control_net_lllite", "sdxl", "lllite"),
    ("sdxl_train_control_net_lllite_old", "sdxl", "lllite"),
    ("sdxl_train_leco", "sdxl", "leco"),
    ("sdxl_train_textual_inversion", "sdxl", "textual_inversion"),
    ("train_control_net", "sd", "control_net"),
    ("train_controlnet", "sd", "control_net"),
    ("train_db", "sd", "full"),
    ("train_leco", "sd", "leco"),
    ("train_textual_inversion", "sd", "textual_inversion"),
}


@pytest.fixture(autouse=True)
def quiet_logger(caplog, monkeypatch):
    monkeypatch.setattr(train_util, "setup_logging", lambda *arguments: None)
    logger = logging.getLogger("diffusion_scripts")
    before = logger.propagate, logger.handlers[:]
    logger.propagate, logger.handlers[:] = True, []
    yield
    logger.propagate, logger.handlers[:] = before


def _texts(family, values, task="network"):
    return [str(problem) for problem in find_problems(family, task, make_options(family, task, values))]


def test_unavailable_scripts():
    found = set()
    for path in freeze_flags.script_paths():
        module = freeze_flags.load_script(path)
        if hasattr(module, "TASK") and module.TASK not in load_family(module.FAMILY).available_tasks:
            found.add((path.stem, module.FAMILY, module.TASK))
    assert found == UNAVAILABLE


@pytest.mark.parametrize(("script", "family", "task"), sorted(UNAVAILABLE))
def test_unavailable_scripts_say_so_in_one_line(script, family, task, capsys):
    argv = ["--prompts_file", "p.toml"] if task == "leco" else []
    with pytest.raises(SystemExit) as caught:
        main(family, task, argv=argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert load_family(family).title in error and "not available in this version" in error


def test_unavailable_families_still_check_options():
    texts = _texts("sdxl", {"max_train_steps": 0, "v2": True}, task="full")
    assert len(texts) == 3 and texts[0].startswith("--max_train_steps") and texts[1].startswith("--v2")
    with pytest.raises(FeatureNotAvailable):
        train_util.train("sdxl", "full", make_options("sdxl", "full", {}))


@pytest.mark.parametrize("family", COMPLETE)
def test_a_complete_command_line_has_no_problems(family):
    assert _texts(family, COMPLETE[family]) == []
    given = make_options(family, "network", {**COMPLETE[family], "dataset_config": None}, dataset={"datasets": []})
    assert find_problems(family, "network", given) == []
    assert given[DatasetDict].content == {"datasets": []}


def test_what_is_missing_is_named_together():
    texts = _texts("flux", {})
    assert [text.split(":")[0] for text in texts] == [
        "--pretrained_model_name_or_path",
        "--output_dir",
        "--dataset_config",
        "--clip_l",
        "--t5xxl",
        "--ae",
    ]
    texts = _texts("sd", {**SD, "dataset_config": None, "train_data_dir": "images"})
    assert texts == ["--resolution: is required with --train_data_dir"]


def _network_options(family):
    line = load_family(family).command_line("network")
    found = options_of(line.groups, line.defaults, line.hidden, line.choices)
    return {option.name: option for options in found.values() for option in options}


def _changed(option):
    if option.name in SPECIAL:
        return SPECIAL[option.name]
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    value = SAMPLES.get(option.kind, 3)
    return ["key=value"] if option.many else value


@pytest.mark.parametrize("family", COMPLETE)
@pytest.mark.parametrize("name", PENDING_FLAGS)
def test_pending_flags_are_errors(family, name):
    option = _network_options(family)[name]
    texts = _texts(family, {**COMPLETE[family], name: _changed(option)})
    if name in no_effect_reasons(family):
        assert texts == []
    else:
        assert f"--{name}: {PENDING_FLAGS[name]} is not available in this version yet" in texts
    assert _texts(family, {**COMPLETE[family], name: option.default}) == []


def test_pending_flags_all_exist():
    everywhere = {}
    for family in FAMILIES:
        for task in load_family(family).tasks:
            everywhere |= {
                option.name: option
                for options in options_of(load_family(family).command_line(task).groups).values()
                for option in options
            }
    assert set(PENDING_FLAGS) <= set(everywhere)
    for family, table in NO_EFFECT.items():
        assert family == "*" or family in FAMILIES
        assert set(table) <= set(everywhere)


def test_chroma_says_what_it_needs():
    texts = _texts("flux", {**SD, "t5xxl": "t", "ae": "a", "model_type": "chroma"})
    assert [text.split(":")[0] for text in texts] == ["--model_type = 'chroma'", "--guidance_scale"]
    assert "needs --apply_t5_attn_mask" in texts[0] and "give --guidance_scale 0" in texts[1]
    given = {"model_type": "chroma", "apply_t5_attn_mask": True, "guidance_scale": 0.0}
    assert _texts("flux", {**SD, "t5xxl": "t", "ae": "a", **given}) == []


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("flux", {"clip_skip": 2}, "--clip_skip has no effect: it belongs to the CLIP prompts"),
        ("flux", {"v2": True, "v_parameterization": True}, "--v2 has no effect: it names Stable Diffusion 2.x"),
        ("flux", {"min_snr_gamma": 5.0}, "--min_snr_gamma has no effect"),
        ("flux", {"huber_c": 0.2}, "--huber_c has no effect: only --loss_type huber and smooth_l1"),
        ("flux", {"sigmoid_scale": 2.0}, "--sigmoid_scale has no effect: only --timestep_sampling sigmoid"),
        ("sd", {"zero_terminal_snr": True}, "--zero_terminal_snr: its last step"),
        ("flux", {"vae": "x"}, "--vae has no effect: the autoencoder is named by --ae"),
        ("sd", {"lowram": True}, "--lowram has no effect: models are always read"),
        ("sd", {"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, "with --lr_scheduler cosine"),
        (
            "sd",
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
            "--persistent_data_loader_workers has no effect: data-loader",
        ),
    ],
)
def test_no_effect_is_one_warning(family, values, expected, caplog):
    options = make_options(family, "network", {**COMPLETE[family], **values})
    caplog.set_level("INFO")
    train_util.check_options(family, "network", options)
    assert expected in caplog.text


@pytest.mark.parametrize(
    ("family", "values", "where"),
    [
        ("sd", {"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs"),
        (
            "sd",
            {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "shuffle_caption": True},
            "--shuffle_caption",
        ),
        ("flux", {"cache_text_encoder_outputs": True, "token_warmup_step": 5}, "--token_warmup_step"),
        ("flux", {"cache_caption_variants": 3}, "--cache_caption_variants"),
        ("flux", {"cache_text_encoder_outputs": True, "cache_caption_variants": 0}, "--cache_caption_variants"),
        ("sd", {"cache_latents": True, "face_crop_aug_range": "1,2"}, "--face_crop_aug_range"),
        ("sd", {"verify_caches": True, "skip_cache_check": True}, "--verify_caches"),
        ("sd", {"alpha_background": "#12"}, "--alpha_background"),
        (
            "flux",
            {"cache_text_encoder_outputs": True, "network_args": ["train_t5xxl=True"]},
            "--cache_text_encoder_outputs",
        ),
        ("sd", {"bucket_reso_steps": 32}, "--bucket_reso_steps"),
        ("flux", {"bucket_reso_steps": 24}, "--bucket_reso_steps"),
        ("sd", {"resolution": "512,512,512"}, "--resolution"),
        ("sd", {"resolution": "0"}, "--resolution"),
        ("sd", {"min_timestep": 500, "max_timestep": 500}, "--min_timestep"),
        ("sd", {"network_train_unet_only": True, "network_train_text_encoder_only": True}, "--network_train_unet_only"),
        ("sd", {"dim_from_weights": True}, "--dim_from_weights"),
        ("sd", {"network_args": ["novalue"]}, "--network_args"),
        ("sd", {"base_weights": ["a"], "base_weights_multiplier": [1, 2]}, "--base_weights_multiplier"),
        ("sd", {"use_8bit_adam": True, "optimizer_type": "AdamW"}, "--use_8bit_adam"),
        ("sd", {"log_with": "tensorboard"}, "--log_with"),
        ("sd", {"sample_at_first": True}, "--sample_prompts"),
        ("sd", {"validation_split": 1.0}, "--validation_split"),
        ("sd", {"train_batch_size": 0}, "--train_batch_size"),
        ("sd", {"record_steps": "x", "replay_steps": "x"}, "--record_steps"),
        ("flux", {"logit_std": 0.0}, "--logit_std"),
        ("flux", {"discrete_flow_shift": -1.0}, "--discrete_flow_shift"),
    ],
)
def test_contradictions(family, values, where):
    (text,) = _texts(family, {**COMPLETE[family], **values})
    assert text.startswith(where)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("sd", {"cache_text_encoder_outputs": True, "network_train_unet_only": True}),
        ("flux", {"cache_text_encoder_outputs": True, "caption_dropout_rate": 0.1}),
        ("flux", {"cache_text_encoder_outputs": True, "shuffle_caption": True, "cache_caption_variants": 2}),
        ("flux", {"cache_text_encoder_outputs": True}),  # CLIP is trained and encoded again, T5 is cached
        ("flux", {"cache_text_encoder_outputs": True, "network_args": ["train_t5xxl=False"]}),
        ("flux", {"bucket_reso_steps": 16, "timestep_sampling": "flux_shift", "weighting_scheme": "logit_normal"}),
        ("sd", {"resolution": "512, 768", "compile": True, "compile_dynamic": "auto"}),
        ("sd", {"use_8bit_adam": True, "lr_warmup_steps": 0.1, "lr_scheduler": "linear"}),
    ],
)
def test_combinations_that_work(family, values):
    assert _texts(family, {**COMPLETE[family], **values}) == []


def test_main_runs_the_engine_with_the_options(monkeypatch):
    calls = []

    def fake_resolve(reference):
        if reference == "library.training.run:run":
            return lambda *arguments: calls.append(arguments) or SimpleNamespace(exit_code=0)
        return resolve(reference)

    monkeypatch.setattr(train_util, "resolve", fake_resolve)
    argv = [text for name, value in SD.items() for text in (f"--{name}", value)]
    main("sd", "network", argv=[*argv, "--dry_run", "--network_dim", "8"])
    ((family, task, options),) = calls
    assert (family.name, task, options[NetworkOptions].network_dim) == ("sd", "network", 8)
    assert options[ConfigOptions].dry_run and options.origin("network_dim") == "cli"


def test_main_takes_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--netwrk_dim", "8"])
    with pytest.raises(SystemExit) as caught:
        main("sd", "network")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --netwrk_dim: unknown flag; did you mean --network_dim?\n"


def test_main_on_interrupt(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_util, "train", interrupt)
    with pytest.raises(SystemExit) as caught:
        main("sd", "network", argv=[])
    assert caught.value.code == 130


def test_output_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main("sd", "network", argv=["--output_config", "--network_dim", "4", "--wandb_api_key", "k"])
    assert tomllib.loads((tmp_path / "config.toml").read_text()) == {"network_dim": 4}
    main("sd", "leco", argv=["--output_config", "--config_file", "leco", "--network_dim", "4", "--seed", "1"])
    assert tomllib.loads((tmp_path / "leco.toml").read_text()) == {"seed": 1}
    with pytest.raises(SystemExit) as caught:
        main("sd", "network", argv=["--output_config"])
    assert caught.value.code == 2 and "exists already" in capsys.readouterr().err


def test_presets_and_trackers():
    dreambooth = parse_options("sd", "full", [], preset="dreambooth")
    assert dreambooth[Preset].name == "dreambooth"
    family = load_family("sd")
    assert family.tracker_name("full", dreambooth) == "dreambooth"
    assert family.tracker_name("full", parse_options("sd", "full", [])) == "finetuning"
    assert family.tracker_name("network", parse_options("sd", "network", [])) == "network_train"
    with pytest.raises(UserError, match="in_json"):
        parse_options("sd", "full", ["--in_json", "x"], preset="dreambooth")


def test_unknown_names_are_answered():
    with pytest.raises(UserError, match="did you mean 'flux'"):
        load_family("fluxx")
    with pytest.raises(UserError, match="tasks of flux"):
        make_options("flux", "lllite", {})
    with pytest.raises(UserError, match="did you mean 'network_dim'"):
        make_options("flux", "network", {"netwrk_dim": 4})


def test_renamed_scripts_say_so(caplog):
    with pytest.raises(SystemExit):
        main("sd", "control_net", argv=[], renamed_to="train_control_net.py")
    assert "called train_control_net.py now" in caplog.text


def test_defaults_by_family():
    flux = make_options("flux", "network", {}).namespace()
    assert (flux.discrete_flow_shift, flux.timestep_sampling, flux.save_model_as) == (3.0, "sigma", "safetensors")
    assert make_options("lumina", "network", {}).namespace().discrete_flow_shift == 6.0
    assert make_options("flux", "full", {}).namespace().save_model_as is None
    assert make_options("sd", "network", {})[ModelOptions].v2 is False


def test_only_available_tasks_have_an_implementation():
    available = set().union(*(load_family(name).available_tasks for name in FAMILIES))
    assert {name for name, task in TASKS.items() if task.implementation} == available
