"""Hashes, model specification, configuration entries of checkpoints."""

import base64
import json

import pytest
import torch
from support.runs import GOLDEN

from library import flux_utils, sd_utils
from library.base.errors import CheckpointError
from library.base.hashes import adapter_hashes, model_hashes
from library.base.safetensors_io import TensorFile, load_file, read_header, save_file_atomic
from library.checkpoint.model_spec import model_spec_metadata
from library.modules.loading import merge_config
from library.options.metadata import MetadataOptions


@pytest.mark.parametrize("case", ["sd15_lora_b1", "flux_lora_b1", "sd15_lora_conv_te_lr"])
def test_adapter_hashes_are_the_references(case):
    path = GOLDEN / "runs" / case / "final.safetensors"
    metadata = read_header(path)[1]
    assert adapter_hashes(load_file(path), metadata) == (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"])


def test_model_hashes_are_the_references(inputs):
    metadata = read_header(GOLDEN / "runs" / "sd15_lora_b1" / "final.safetensors")[1]
    assert model_hashes(inputs.model("sd15")) == (metadata["ss_sd_model_hash"], metadata["ss_new_sd_model_hash"])


def spec(**values):
    family = {"architecture": "a", "implementation": "i", "resolution": "1x1"}
    return model_spec_metadata(
        MetadataOptions(**values), family, suffix="/lora", title="t", resolution=None, version="1", extra={"x": None}
    )


def test_model_spec(tmp_path):
    entries = spec(metadata_author="me")
    assert entries["modelspec.architecture"] == "a/lora"
    assert (entries["modelspec.title"], entries["modelspec.author"]) == ("t", "me")
    assert "modelspec.prediction_type" not in entries and "modelspec.x" not in entries
    (tmp_path / "p.png").write_bytes(b"png")
    entries = spec(metadata_thumbnail=str(tmp_path / "p.png"))
    assert entries["modelspec.thumbnail"] == "data:image/png;base64," + base64.b64encode(b"png").decode()
    assert "modelspec.thumbnail" not in spec(metadata_thumbnail="nowhere.png")


def with_config(source, target, config):
    save_file_atomic(load_file(source), target, {"config": json.dumps(config)})
    return TensorFile(target)


def test_config_entry_says_what_shapes_cannot(inputs, tmp_path):
    file = with_config(inputs.model("flux1_dev"), tmp_path / "f.safetensors", {"axes_dims_rope": [8, 12, 12]})
    assert flux_utils.flux_params(file, "").axes_dim == (8, 12, 12)
    file = with_config(inputs.model("flux1_dev"), tmp_path / "f.safetensors", {"num_layers": 9})
    with pytest.raises(CheckpointError, match="num_layers = 9, but tensor shapes say 2"):
        flux_utils.flux_params(file, "")


def test_config_entry_that_is_no_json(inputs, tmp_path):
    save_file_atomic({"a": torch.zeros(1)}, tmp_path / "f.safetensors", {"config": "{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        merge_config({}, TensorFile(tmp_path / "f.safetensors"), fixed=())


def test_published_proportions():
    assert flux_utils.rope_axes(128) == (16, 56, 56)
    assert flux_utils.rope_axes(32) == (4, 14, 14)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ae", "is an autoencoder"),
        ("clip_l", "is a CLIP text encoder"),
        ("t5xxl", "is a T5 encoder"),
        ("sd15", "holds no FLUX"),
    ],
)
def test_another_part_in_the_transformers_flag(inputs, name, text):
    with pytest.raises(CheckpointError, match=text):
        flux_utils.open_transformer(inputs.model(name))


@pytest.mark.parametrize(
    ("name", "text"), [("sdxl", "is an SDXL checkpoint"), ("flux1_dev", "holds no Stable Diffusion U-Net")]
)
def test_another_family_for_sd(inputs, name, text):
    with pytest.raises(CheckpointError, match=text):
        sd_utils.open_checkpoint(inputs.model(name))


def test_missing_and_unexpected_tensors_are_listed(inputs, tmp_path):
    tensors = load_file(inputs.model("flux1_dev"))
    del tensors["img_in.bias"]
    tensors["stray.weight"] = torch.zeros(1)
    save_file_atomic(tensors, tmp_path / "f.safetensors")
    file, prefix = flux_utils.open_transformer(str(tmp_path / "f.safetensors"))
    with pytest.raises(CheckpointError, match="1 missing: img_in.bias; 1 unexpected: stray.weight"):
        flux_utils.load_transformer(file, prefix, sd_utils.Need())


def test_prefixed_transformer_is_read(inputs, tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(inputs.model("flux1_dev")).items()}
    save_file_atomic(tensors, tmp_path / "f.safetensors")
    file, prefix = flux_utils.open_transformer(str(tmp_path / "f.safetensors"))
    model = flux_utils.load_transformer(file, prefix, sd_utils.Need())
    assert torch.equal(model.img_in.weight, tensors["model.diffusion_model.img_in.weight"])


def test_old_text_encoder_names_are_read(inputs, tmp_path):
    from library.modules.clip import load_clip_text
    from library.modules.components import Need

    old = {}
    for name, tensor in load_file(inputs.model("sd15")).items():
        old[name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")] = tensor
    save_file_atomic(old, tmp_path / "old.safetensors")
    prefix = "cond_stage_model.transformer."
    load = [
        load_clip_text(TensorFile(path), prefix, need=Need())
        for path in (inputs.model("sd15"), tmp_path / "old.safetensors")
    ]
    assert all(torch.equal(a, b) for a, b in zip(load[0].parameters(), load[1].parameters(), strict=True))
