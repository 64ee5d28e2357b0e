"""Run training in this process, on tiny models, through the same doors as the scripts."""

import importlib.util
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from library.base.safetensors_io import load_file, read_header
from library.train_util import parse_options, train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILY_OF = {
    "train_network.py": "sd",
    "sdxl_train_network.py": "sdxl",
    "sd3_train_network.py": "sd3",
    "flux_train_network.py": "flux",
    "anima_train_network.py": "anima",
    "lumina_train_network.py": "lumina",
    "hunyuan_image_train_network.py": "hunyuan_image",
}
# the files that a family's scripts are told of, and what else its tiny models need
MODEL_FLAGS: dict[str, dict[str, str]] = {
    "sd": {"--pretrained_model_name_or_path": "sd15"},
    "sd2": {"--pretrained_model_name_or_path": "sd21"},
    "sdxl": {"--pretrained_model_name_or_path": "sdxl"},
    "chroma": {"--pretrained_model_name_or_path": "chroma", "--t5xxl": "t5xxl", "--ae": "ae"},
    "sd3": {
        "--pretrained_model_name_or_path": "sd3_medium",
        "--clip_l": "clip_l",
        "--clip_g": "clip_g",
        "--t5xxl": "t5xxl",
    },
    "sd35": {
        "--pretrained_model_name_or_path": "sd35_medium",
        "--clip_l": "clip_l",
        "--clip_g": "clip_g",
        "--t5xxl": "t5xxl",
    },
    "flux": {
        "--pretrained_model_name_or_path": "flux1_dev",
        "--clip_l": "clip_l",
        "--t5xxl": "t5xxl",
        "--ae": "ae",
    },
    "anima": {"--pretrained_model_name_or_path": "anima", "--qwen3": "qwen3", "--vae": "qwen_image_vae"},
    "hunyuan_image": {
        "--pretrained_model_name_or_path": "hunyuan_image",
        "--text_encoder": "qwen2_5_vl",
        "--byt5": "byt5",
        "--vae": "hunyuan_image_vae",
    },
    "lumina": {"--pretrained_model_name_or_path": "lumina2", "--gemma2": "gemma2_2b", "--ae": "ae"},
}
# models that are variants of a family
FAMILY = {"chroma": "flux", "sd2": "sd", "sd35": "sd3"}
MORE_FLAGS: dict[str, tuple[str, ...]] = {
    "sd3": ("--t5xxl_max_token_length", "32"),
    "sd35": ("--t5xxl_max_token_length", "32"),
    "flux": ("--t5xxl_max_token_length", "32"),
    "chroma": (
        *("--model_type", "chroma", "--t5xxl_max_token_length", "32", "--apply_t5_attn_mask"),
        *("--guidance_scale", "0", "--model_prediction_type", "raw", "--timestep_sampling", "sigmoid"),
    ),
    "anima": ("--qwen3_max_token_length", "32", "--t5_max_token_length", "32"),
    "lumina": ("--gemma2_max_token_length", "32"),
}
NETWORK_MODULES = {
    "sd": "networks.lora",
    "sd2": "networks.lora",
    "sdxl": "networks.lora",
    "sd3": "networks.lora_sd3",
    "sd35": "networks.lora_sd3",
    "flux": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "anima": "networks.lora_anima",
    "lumina": "networks.lora_lumina",
    "hunyuan_image": "networks.lora_hunyuan_image",
}


@dataclass(frozen=True)
class Inputs:
    """A folder with models, tokenizers and data."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> "Inputs":
        spec = importlib.util.spec_from_file_location("make_inputs", GOLDEN / "make_inputs.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.write_inputs(folder)
        return cls(folder)

    def model(self, name: str) -> str:
        return str(self.folder / "models" / f"{name}_tiny.safetensors")

    def base(self, family: str) -> list[str]:
        """Flags that name the model's files."""
        named = [part for flag, name in MODEL_FLAGS[family].items() for part in (flag, self.model(name))]
        return [*named, *MORE_FLAGS.get(family, ()), "--tokenizer_cache_dir", str(self.folder / "tokenizers")]


def dataset_toml(folder: Path, inputs: Inputs, *, batch_size: int = 1, subset: str = "", dataset: str = "") -> Path:
    """A dataset file over the photographs; `subset` and `dataset` add lines to these tables."""
    path = folder / "dataset.toml"
    path.write_text(
        f"""
[[datasets]]
batch_size = {batch_size}
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 64
resolution = 128
{dataset}
  [[datasets.subsets]]
  image_dir = '{inputs.folder / "data" / "img"}'
  caption_extension = '.txt'
{subset}
"""
    )
    return path


def network_arguments(family: str, inputs: Inputs, folder: Path, dataset: Path, *more: str) -> list[str]:
    """A short adapter training of a family."""
    return [
        *inputs.base(family),
        *("--network_module", NETWORK_MODULES[family]),
        *("--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3"),
        *("--dataset_config", str(dataset), "--output_dir", str(folder / "out"), "--output_name", "last"),
        *("--seed", "42", "--max_train_steps", "4", "--max_data_loader_n_workers", "0"),
        *more,
    ]


def run_training(family: str, arguments: list[str], task: str = "network") -> Any:
    """What a script does after reading its command line."""
    family = FAMILY.get(family, family)
    return train(family, task, parse_options(family, task, arguments))


@dataclass(frozen=True)
class Case:
    """A recorded run of the reference."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / "runs" / self.name

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "steps" / "steps.jsonl").read_text().splitlines()]

    def grad_norms(self) -> list[float]:
        return json.loads((self.folder / "logs.json").read_text())["grad_norm"]

    def file(self, name: str) -> Path:
        """`init` or `final`; cases that begin alike keep one file."""
        same = self.folder / f"{name}.same_as"
        folder = self.folder.parent / same.read_text().strip() if same.exists() else self.folder
        return folder / f"{name}.safetensors"

    def tensors(self, name: str) -> dict[str, Any]:
        """As the reference's files held them: `init` is kept without tensors of zeros, `final` often as differences."""
        stored, end = load_file(self.file("init")), load_file(self.file("final"))
        start = {key: stored.get(key, torch.zeros(value.shape)) for key, value in end.items()}
        if name == "init":
            return start
        return {key: start[key] + value if value.dtype == torch.float16 else value for key, value in end.items()}

    def script_and_arguments(self, inputs: Inputs, work: Path) -> tuple[str, list[str]]:
        """The recorded command with our folders, replaying the record from the recorded start."""
        work.mkdir(parents=True, exist_ok=True)
        toml = (self.folder / "dataset.toml").read_text().replace("$INPUTS", str(inputs.folder))
        (work / "dataset.toml").write_text(toml)
        command = (self.folder / "cmd.txt").read_text()
        command = command.replace("$INPUTS", str(inputs.folder)).replace("$CASE", str(work))
        script, *arguments = shlex.split(command)
        save_file(self.tensors("init"), work / "init.safetensors", metadata=read_header(self.file("init"))[1])
        return script, [
            *arguments,
            *("--network_weights", str(work / "init.safetensors")),
            *("--replay_steps", str(self.folder / "steps"), "--record_steps", str(work / "steps")),
        ]


def events(folder: Path, name: str = "last") -> list[dict[str, Any]]:
    """The event log of a run in `folder`."""
    return [json.loads(line) for line in (folder / f"{name}_events.jsonl").read_text().splitlines()]
