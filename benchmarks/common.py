"""What the benchmarks share: tiny models, commands, medians."""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def write_inputs(folder: Path) -> Path:
    """Tiny models, tokenizers, photographs and a dataset file in `folder`."""
    spec = importlib.util.spec_from_file_location("make_inputs", ROOT / "tests" / "golden" / "make_inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_inputs(folder)
    (folder / "dataset.toml").write_text(
        "[[datasets]]\nresolution = 128\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'data' / 'img'}'\ncaption_extension = '.txt'\n"
    )
    return folder


def training_arguments(family: str, folder: Path, steps: int) -> list[str]:
    """A short adapter training with everything cached in memory."""
    models = folder / "models"
    if family == "sd":
        files = ["--pretrained_model_name_or_path", str(models / "sd15_tiny.safetensors")]
        files += ["--network_module", "networks.lora"]
    else:
        files = ["--pretrained_model_name_or_path", str(models / "flux1_dev_tiny.safetensors")]
        for flag, name in (("--clip_l", "clip_l"), ("--t5xxl", "t5xxl"), ("--ae", "ae")):
            files += [flag, str(models / f"{name}_tiny.safetensors")]
        files += ["--t5xxl_max_token_length", "64"]
    return [
        *files,
        *("--tokenizer_cache_dir", str(folder / "tokenizers"), "--dataset_config", str(folder / "dataset.toml")),
        *("--output_dir", str(folder / "out"), "--output_name", family, "--network_dim", "4", "--seed", "1"),
        *("--max_train_steps", str(steps), "--cache_latents", "--max_data_loader_n_workers", "0"),
        *("--cache_text_encoder_outputs", "--network_train_unet_only"),
    ]


def seconds(command: list[str]) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return time.perf_counter() - started


def median(measure: Callable[[], float], runs: int = 5) -> float:
    """Median of several measurements after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(runs))
