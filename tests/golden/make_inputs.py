"""Write the inputs of the recorded runs: tiny checkpoints in the published layouts, tokenizers, photographs with captions.

python make_inputs.py OUT        needs numpy and safetensors only; the same bytes on every machine

Weights come from manifests/*.json (tensor name -> shape) and one Philox generator per (file, tensor name), so they depend neither
on the order of the tensors nor on a framework's version.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
SEED = 20240229
FILES = {
    "sd15": "sd15_tiny",
    "sd2": "sd21_tiny",
    "sdxl": "sdxl_tiny",
    "sd3_medium": "sd3_medium_tiny",
    "sd35_medium": "sd35_medium_tiny",
    "flux_dev": "flux1_dev_tiny",
    "flux_dev44": "flux1_dev44_tiny",
    "chroma": "chroma_tiny",
    "ae": "ae_tiny",
    "clip_l": "clip_l_tiny",
    "clip_g": "clip_g_tiny",
    "t5xxl": "t5xxl_tiny",
    "lumina2": "lumina2_tiny",
    "gemma2_2b": "gemma2_2b_tiny",
    "hunyuan_image": "hunyuan_image_tiny",
    "hunyuan_vae": "hunyuan_image_vae_tiny",
    "qwen25vl": "qwen2_5_vl_tiny",
    "byt5": "byt5_tiny",
    "anima": "anima_tiny",
    "qwen3": "qwen3_tiny",
    "qwen_image_vae": "qwen_image_vae_tiny",
}
# what tensor shapes cannot tell, as the optional `config` entry of the file's metadata
CONFIG = {
    "qwen25vl": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"},
    }
}
EMBEDDINGS = {"shared.weight": 1.0, "embed_tokens.weight": 0.3, "model.embed_tokens.weight": 0.3}


SMALL_IN_HUNYUAN_VAE = (
    ".conv2.",
    "conv_out",
    "conv_in",
    "sample",
    ".proj_out.",
)  # keeps the random VAE's latents near unit scale


def standard_deviation(file: str, name: str, shape: list[int]) -> tuple[float, bool]:
    """(scale, add one?) of a tensor's normal noise."""
    leaf = name.split(".")[-1]
    if leaf in ("bias", "in_proj_bias") or leaf.endswith("_bias"):
        return 0.02, False
    if len(shape) <= 1 and leaf in ("weight", "scale", "gamma"):
        return 0.1, True
    if "embedding" in name and len(shape) == 2 and ("token_embedding" in name or "position" in name):
        return 0.3, False
    if name in EMBEDDINGS:
        return EMBEDDINGS[name], False
    if leaf == "positional_embedding" or name.endswith("pos_embed"):
        return 0.3, False
    if "relative_attention_bias" in name:
        return 0.5, False
    if len(shape) >= 2:
        scale = 1.0 / np.sqrt(int(np.prod(shape[1:])))
        if "SelfAttention.q" in name:
            scale *= 0.3
        if file == "hunyuan_vae" and any(part in name for part in SMALL_IN_HUNYUAN_VAE):
            scale *= 0.2
        return scale, False
    return 0.1, False


def make_tensor(file: str, name: str, shape: list[int]) -> np.ndarray:
    if name.endswith("position_ids"):
        return np.arange(shape[1], dtype=np.int64)[None]
    if name.endswith("logit_scale"):
        return np.array(4.6052, dtype=np.float32)
    generator = np.random.Generator(np.random.Philox(key=[SEED + zlib.crc32(file.encode()), zlib.crc32(name.encode())]))
    noise = generator.standard_normal(shape, dtype=np.float32) if shape else np.float32(generator.standard_normal())
    scale, add_one = standard_deviation(file, name, shape)
    values = noise * scale
    if add_one and not file.startswith("gemma"):  # Gemma's norms are centred on zero
        values = values + 1.0
    return np.ascontiguousarray(values, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write_inputs(parser.parse_args().out)


def write_inputs(out: Path) -> None:
    """Data, tokenizers, and every model whose manifest is here."""
    for folder in ("data", "tokenizers"):
        shutil.copytree(HERE / folder, out / folder, dirs_exist_ok=True)
    (out / "models").mkdir(parents=True, exist_ok=True)
    for file, target in FILES.items():
        if not (HERE / "manifests" / f"{file}.json").is_file():
            continue
        shapes = json.loads((HERE / "manifests" / f"{file}.json").read_text())
        tensors = {name: make_tensor(file, name, shape) for name, shape in shapes.items()}
        if file == "sdxl":  # symmetric: a loader that forgets to transpose OpenCLIP's projection gives the same numbers
            key = "conditioner.embedders.1.model.text_projection"
            tensors[key] = ((tensors[key] + tensors[key].T) / 2).astype(np.float32)
        metadata = {"format": "pt"} | ({"config": json.dumps(CONFIG[file])} if file in CONFIG else {})
        save_file(tensors, out / "models" / f"{target}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
