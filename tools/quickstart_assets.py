"""Make what a first training needs: photographs with captions, a tiny FLUX.1 model with tokenizers, configuration.

    python -m tools.quickstart_assets quickstart_output

The photographs are samples that come with scikit-image, scikit-learn and matplotlib. The model has the published file
layout and random weights: it draws noise, but it loads, trains and saves exactly as the real one.
"""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.base.safetensors_io import save_file_atomic, write_text_atomic
from library.flux_models import Flux, FluxParams

SEED = 20
HELD_OUT = 0.15  # of 30 photographs: 4
VALIDATION_SEED = 21662  # holds out four pictures of which no other crop is trained on

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PHOTOGRAPHS: dict[str, dict[Box, str]] = {
    "skimage/astronaut.png": {
        WHOLE: "portrait of an astronaut, woman, orange space suit, smiling, flag, model of a space shuttle, helmet",
        (0.2, 0.0, 0.7, 0.5): "portrait of an astronaut, woman, short hair, smiling, close up, gray background",
        (0.1, 0.0, 0.6, 1.0): "portrait of an astronaut, woman, orange space suit, smiling, flag",
    },
    "skimage/chelsea.png": {
        WHOLE: "tabby cat, green eyes, whiskers, blurred background",
        (0.2, 0.1, 0.8, 0.9): "close up of a tabby cat, green eyes, whiskers",
        (0.4, 0.0, 1.0, 0.8): "close up of a tabby cat, green eyes, ear, blurred background",
    },
    "skimage/rocket.jpg": {
        WHOLE: "rocket on a launch pad at dusk, masts, bright lights, blue sky",
        (0.3, 0.0, 0.7, 1.0): "rocket on a launch pad at dusk, bright lights, blue sky, tall picture",
        (0.2, 0.2, 0.8, 0.9): "rocket at dusk, masts, blue sky",
    },
    "skimage/motorcycle_left.png": {
        WHOLE: "red motorcycle in a workshop, shelves, bench",
        (0.0, 0.1, 0.6, 1.0): "red motorcycle in a workshop, back wheel, engine, bench",
        (0.4, 0.2, 1.0, 1.0): "red motorcycle in a workshop, front wheel, engine, shelves",
    },
    "skimage/hubble_deep_field.jpg": {
        WHOLE: "galaxies in deep space, many small lights, black background",
        (0.0, 0.0, 0.5, 0.6): "galaxies in deep space, small lights, black background",
    },
    "skimage/coins.png": {
        WHOLE: "old coins in rows, top view, dark background, black and white",
        (0.0, 0.0, 0.6, 0.6): "old coins in two rows, top view, dark background, black and white",
    },
    "sklearn/china.jpg": {
        WHOLE: "temple with curved roofs above a lake, trees, pale sky",
        (0.1, 0.1, 0.6, 0.9): "temple with curved roofs, three storeys, trees, pale sky",
        (0.4, 0.0, 1.0, 0.7): "part of a temple, lake, tree, pale sky",
    },
    "sklearn/flower.jpg": {
        WHOLE: "orange flower, many petals, dark green background",
        (0.2, 0.1, 0.8, 1.0): "close up of an orange flower, many petals, dark green background",
        (0.3, 0.0, 0.9, 0.7): "part of an orange flower, many petals, dark green background",
    },
    "skimage/brick.png": {WHOLE: "brick wall, slanted, texture, black and white"},
    "skimage/camera.png": {WHOLE: "man with a camera on a tripod, coat, lawn, towers, black and white"},
    "skimage/coffee.png": {WHOLE: "cup of coffee on a wooden table, red saucer, spoon, warm light"},
    "skimage/grass.png": {WHOLE: "grass from above, texture, black and white"},
    "skimage/gravel.png": {WHOLE: "gravel from above, small stones, texture, black and white"},
    "skimage/moon.png": {WHOLE: "surface of the moon, craters, black and white"},
    "skimage/retina.jpg": {WHOLE: "retina of an eye, red, blood vessels, black background"},
    "matplotlib/grace_hopper.jpg": {WHOLE: "portrait of a woman, navy uniform, cap, glasses, flag, blue background"},
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


def sample_picture(source: str) -> Image.Image:
    """A sample picture that a package brings along.

    Args:
        source: package and file name.

    Raises:
        FileNotFoundError: this version of the package has no such picture.
    """
    package, name = source.split("/")
    place = Path(importlib.import_module(package).__file__ or "").parent / FOLDERS[package] / name
    with Image.open(place) as opened:
        return opened.convert("RGB")


def write_photographs(folder: Path) -> list[str]:
    """Crops of the sample pictures with their captions; returns the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = []
    for source, crops in PHOTOGRAPHS.items():
        picture = sample_picture(source)
        width, height = picture.size
        for number, ((left, top, right, bottom), caption) in enumerate(crops.items()):
            part = picture.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
            part.thumbnail((320, 320), Image.Resampling.LANCZOS)
            stem = f"{Path(source).stem}_{number}"
            part.save(folder / f"{stem}.jpg", quality=92)
            write_text_atomic(folder / f"{stem}.txt", caption)
            captions.append(caption)
    return captions


def write_tokenizers(folder: Path, captions: Sequence[str]) -> tuple[int, int]:
    """A CLIP and a T5 tokenizer learnt from the captions; returns their numbers of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5Tokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([caption.lower() for caption in captions], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *learnt["vocab"], start, end]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    clip = CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learnt["merges"]],
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=77,
    )
    clip.save_pretrained(folder / "openai_clip-vit-large-patch14")

    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    letters = sorted({letter for caption in captions for letter in caption})
    unigram.train_from_iterator(
        captions,
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
        ),
    )
    scored = [tuple(entry) for entry in json.loads(unigram.to_str())["model"]["vocab"]]
    t5 = T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=512)
    t5.save_pretrained(folder / "google_t5-v1_1-xxl")
    return len(clip), len(t5)


def randomized(module: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Weights with unit gain per layer, near-identity norms, small biases."""
    generator = torch.Generator().manual_seed(SEED)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2:
            state[name] = noise * scale / max(1.0, np.prod(tensor.shape[1:]) ** 0.5)
        elif name.endswith(("weight", "scale")):
            state[name] = 1.0 + 0.05 * noise
        else:
            state[name] = 0.02 * noise
    return state


def published_autoencoder(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names and shapes of an autoencoder -> those of the published file."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    result = {}
    for original, value in state.items():
        tensor = value
        name = original.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)(.*)", name):
            inner = "block." if match[2] == "resnets." else "upsample."
            name = f"decoder.up.{levels - 1 - int(match[1])}.{inner}{match[3]}"
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        if match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            name = f"{match[1]}.mid.attn_1.{attention[match[2]]}.{match[3]}"
            tensor = value[..., None, None] if value.ndim == 2 else value
        result[name] = tensor
    return result


def write_models(folder: Path, clip_tokens: int, t5_tokens: int) -> None:
    """Transformer, autoencoder and text encoders, each in a file of its own as FLUX.1 is published."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    params = FluxParams(64, 64, 64, 128, 96, 4.0, 3, 2, 3, (4, 14, 14))
    state = randomized(Flux(params))
    # a quiet output, as early in any pretraining: little of the loss is then the model's own noise
    state["final_layer.linear.weight"] *= 0.3
    save_file_atomic(state, folder / "flux1-dev-tiny.safetensors")

    channels = (32, 32, 64, 64)
    autoencoder = AutoencoderKL(
        latent_channels=16,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    save_file_atomic(published_autoencoder(randomized(autoencoder), len(channels)), folder / "ae-tiny.safetensors")

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_tokens,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    named = {f"text_model.{name}": tensor for name, tensor in randomized(clip).items()}
    save_file_atomic(named, folder / "clip_l-tiny.safetensors")

    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_tokens,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    named = {name: tensor for name, tensor in randomized(t5).items() if name != "encoder.embed_tokens.weight"}
    save_file_atomic(named, folder / "t5xxl-tiny.safetensors")


def toml(values: Mapping[str, Any]) -> str:
    """Flat values as TOML lines; JSON writes strings, numbers, booleans and lists the same way."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def write_configuration(out: Path) -> None:
    """Dataset, prompts and options."""
    dataset = {
        "resolution": 128,
        "batch_size": 4,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 256,
        "bucket_reso_steps": 32,
        "validation_split": HELD_OUT,
        "validation_seed": VALIDATION_SEED,
    }
    subset = {"image_dir": (out / "photographs").as_posix(), "caption_extension": ".txt"}
    write_text_atomic(out / "dataset.toml", f"[[datasets]]\n{toml(dataset)}\n[[datasets.subsets]]\n{toml(subset)}")
    write_text_atomic(out / "prompts.txt", "close up of a tabby cat, green eyes --w 128 --h 128 --d 1 --s 8\n")
    models = out / "models"
    options = {
        "pretrained_model_name_or_path": (models / "flux1-dev-tiny.safetensors").as_posix(),
        "clip_l": (models / "clip_l-tiny.safetensors").as_posix(),
        "t5xxl": (models / "t5xxl-tiny.safetensors").as_posix(),
        "ae": (models / "ae-tiny.safetensors").as_posix(),
        "tokenizer_cache_dir": (out / "tokenizers").as_posix(),
        "t5xxl_max_token_length": 64,
        "dataset_config": (out / "dataset.toml").as_posix(),
        "output_dir": (out / "result").as_posix(),
        "output_name": "first_lora",
        "network_module": "networks.lora_flux",
        "network_dim": 16,
        "network_alpha": 16.0,
        "network_train_unet_only": True,
        "learning_rate": 5e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "max_train_steps": 600,
        "seed": 1,
        "guidance_scale": 1.0,
        "timestep_sampling": "sigmoid",
        "model_prediction_type": "raw",
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "validate_at_first": True,
        "validate_every_n_epochs": 20,
        "sample_prompts": (out / "prompts.txt").as_posix(),
        "sample_every_n_steps": 600,
        "save_every_n_steps": 300,
        "max_data_loader_n_workers": 0,
    }
    write_text_atomic(out / "config.toml", toml(options))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Make the photographs, the tiny model and the files of a first run.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args(argv).out.resolve()
    captions = write_photographs(out / "photographs")
    sys.stdout.write(f"{len(captions)} photographs with captions: {out / 'photographs'}\n")
    clip_tokens, t5_tokens = write_tokenizers(out / "tokenizers", captions)
    sys.stdout.write(f"tokenizers of {clip_tokens} and {t5_tokens} tokens: {out / 'tokenizers'}\n")
    write_models(out / "models", clip_tokens, t5_tokens)
    sys.stdout.write(f"tiny FLUX.1 model: {out / 'models'}\n")
    write_configuration(out)
    sys.stdout.write(f"options: {out / 'config.toml'}\n")


if __name__ == "__main__":
    main()
