"""Names, rotation, hashes, averages, metadata and configuration files, against recorded results of the reference."""

import json
import logging
import tomllib
from pathlib import Path

import pytest
import torch

from library.base.errors import UserError
from library.base.hashes import adapter_hashes
from library.base.lazy import resolve
from library.checkpoint.model_spec import model_spec_metadata
from library.checkpoint.saver import Names, Saver
from library.modules.components import Variant
from library.options.metadata import MetadataOptions
from library.options.saving import SavingOptions
from library.tracking.metrics import LossAverage
from library.train_util import load_family, main, parse_options

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "training.json").read_text())


@pytest.mark.parametrize(("row", "base"), [("names", "o"), ("names_default", None)])
def test_names(row, base):
    names = Names(Path("out"), base, ".safetensors")
    assert [path.name for path in (names.epoch(3), names.step(250), names.final())] == GOLDEN[row]


@pytest.mark.parametrize(
    ("row", "options", "event"),
    [
        ("remove_epoch", {"save_every_n_epochs": 2, "save_last_n_epochs": 3}, "epoch"),
        ("remove_step", {"save_every_n_steps": 10, "save_last_n_steps": 30}, "step"),
    ],
)
def test_what_goes_when_something_new_is_saved(row, options, event, tmp_path):
    names = Names(tmp_path, "o", ".safetensors")
    saver = Saver(SavingOptions(**options), names, 99, lambda path, step, epoch: path.write_text("new"))
    for number, gone in GOLDEN[row].items():
        for old in range(70):
            getattr(names, event)(old).write_text("old")
        before = set(tmp_path.iterdir())
        after = saver.after_epoch if event == "epoch" else saver.after_step
        after(*(int(number),) * 2)
        removed = before - set(tmp_path.iterdir())
        assert removed == (set() if gone is None else {getattr(names, event)(gone)}), number


def test_hashes():
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}
    for metadata, recorded in zip(
        ({}, {"ss_x": "1"}), GOLDEN["hashes sd={a:arange(6)f32(2,3), b:ones(3)f16}"].values()
    ):
        assert list(adapter_hashes(tensors, metadata)) == recorded


def test_averages():
    average, seen = LossAverage(3), []
    for loss in (1, 2, 3, 2, 4, 6):
        average.add(loss)
        seen.append(average.value)
    assert seen == pytest.approx(GOLDEN["loss_recorder epoch0 [1,2,3], epoch1 [2,4,6]"])
    # the reference counts the steps before its start as zeros: 6 / 6
    assert GOLDEN["loss_recorder start at epoch3 step5 loss 6"] == 1.0
    late = LossAverage(6)
    late.add(6.0)
    assert late.value == 6.0


@pytest.mark.parametrize(
    ("row", "family", "variant"),
    [
        ("sd15", "sd", Variant(name="v1", base_model_version="sd_v1")),
        ("flux", "flux", Variant(name="dev", base_model_version="flux1")),
        ("schnell", "flux", Variant(name="schnell", base_model_version="flux1")),
        ("chroma", "flux", Variant(name="chroma", base_model_version="chroma")),
        ("sdxl", "sdxl", Variant(name="base", base_model_version="sdxl_base_v1-0")),
        ("sd3", "sd3", Variant(name="5-large", base_model_version="5-large")),
        ("lumina", "lumina", Variant(name="lumina2", base_model_version="lumina2")),
        ("anima", "anima", Variant(name="preview", base_model_version="anima")),
        ("hunyuan", "hunyuan_image", Variant(name="2.1", base_model_version="hunyuan-image-2.1")),
    ],
)
def test_model_specifications(row, family, variant):
    recorded = GOLDEN[f"modelspec lora {row}"]
    rich = row in ("sd15", "sdxl")
    texts = {"metadata_author": "me", "metadata_trigger_phrase": "tp", "metadata_usage_hint": "h"} if rich else {}
    ours = model_spec_metadata(
        MetadataOptions(**texts),
        resolve(load_family(family).model_spec)(variant),
        suffix="/lora",
        title="o",
        resolution="512x768" if rich else None,
        version="1",
        extra={"timestep_range": "100,1000", "encoder_layer": "2"} if rich else {},
    )
    differ = {"modelspec.date", "modelspec.implementation_version"}
    if row == "hunyuan":  # there the size for models that it does not know, here the model's own
        differ.add("modelspec.resolution")
    assert {k: v for k, v in ours.items() if k not in differ} == {k: v for k, v in recorded.items() if k not in differ}
    assert set(ours) == set(recorded)


def test_configuration_files(tmp_path, caplog, monkeypatch):
    """Sections are flattened, as there; texts for numbers are errors and unknown keys warnings, which they are not."""
    recorded = GOLDEN["config_file"]
    file = tmp_path / "c.toml"
    file.write_text("top = 1\n[a]\nnetwork_dim = 4\nunknown_key = 3\n[b]\nxformers = true\n[c.nested]\nz = 1\n")
    monkeypatch.setattr(logging.getLogger("diffusion_scripts"), "propagate", True)
    values = parse_options("sd", "network", ["--config_file", str(file)]).values()
    for name in ("network_dim", "xformers", "max_train_steps"):
        assert repr(values[name]) == recorded[name]
    for name in ("unknown_key", "top", "nested"):
        assert name in caplog.text and name not in values
    file.write_text(f"learning_rate = {recorded['learning_rate']}\n")
    with pytest.raises(UserError, match="learning_rate = '1e-4'"):
        parse_options("sd", "network", ["--config_file", str(file)])
    file.write_text(f"lr_warmup_steps = {recorded['lr_warmup_steps']}\n")
    with pytest.raises(UserError, match="lr_warmup_steps = 100.0"):  # there it means a hundred times the whole run
        parse_options("sd", "network", ["--config_file", str(file)])


def test_written_configuration(tmp_path):
    file = tmp_path / "out.toml"
    arguments = ["--config_file", str(file), "--output_config", "--huggingface_token", "SECRET", "--xformers"]
    main("sd", "network", argv=[*arguments, "--network_dim", "4", "--network_args", "a=1", "b=2"])
    assert GOLDEN["output_config_exit"] == 0  # it returns
    ours, theirs = tomllib.loads(file.read_text()), tomllib.loads(GOLDEN["output_config"])
    assert theirs.pop("huggingface_token") == "SECRET"  # a secret stays out of files
    assert ours == theirs
    assert "SECRET" not in file.read_text()
