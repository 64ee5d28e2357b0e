"""Adapter files: reading, checking and writing.

Keys: `<layer name>.lora_down.weight`, `.lora_up.weight`, `.alpha`. The rank is the first size of `lora_down`, the
strength alpha / rank; a file without alpha means alpha = rank.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.errors import CheckpointError
from library.base.hashes import adapter_hashes
from library.base.logs import logger
from library.base.safetensors_io import TensorFile, atomic_path, save_file_atomic
from networks.engine.selection import Rank

NATIVE_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")
_PICKLE_SUFFIXES = (".pt", ".ckpt")


def read_weights(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or torch file (tensors only, no code is run)."""
    source = TensorFile(file)
    return {name: source.tensor(name) for name in source.shapes}, source.metadata


def check_native(weights: Mapping[str, Any], prefixes: Sequence[str], source: str) -> None:
    """Refuse a file that is not of this kind, instead of training on from a part of it.

    Args:
        weights: the file's tensors.
        prefixes: key prefixes of this network module.
        source: name of the file for messages.

    Raises:
        CheckpointError: keys of another adapter type or dialect, or no layer name that fits the family.
    """
    names = {key.partition(".")[0] for key in weights if "." in key}
    if not any(name.startswith(tuple(f"{prefix}_" for prefix in prefixes)) for name in names):
        shown = ", ".join(list(weights)[:3]) or "no tensors at all"
        raise CheckpointError(
            source, message=f"is not an adapter file of this model (its first keys: {shown}); name another file"
        )
    other = [key for key in weights if "." in key and key.partition(".")[2] not in NATIVE_SUFFIXES]
    if other:
        raise CheckpointError(
            source,
            message=f"holds keys of another adapter type: {', '.join(other[:3])}"
            + (f" and {len(other) - 3} more" if len(other) > 3 else "")
            + "; a LyCORIS file needs --network_module lycoris.kohya",
        )


def stored_ranks(weights: Mapping[str, Tensor], source: str) -> dict[str, Rank]:
    """Rank and alpha of every module of a file.

    Raises:
        CheckpointError: a module lacks one of its two factors.
    """
    ranks = {}
    for key, tensor in weights.items():
        name, _, suffix = key.partition(".")
        if suffix == "lora_down.weight":
            alpha = weights.get(f"{name}.alpha")
            ranks[name] = Rank(tensor.shape[0], float(tensor.shape[0] if alpha is None else alpha))
        if suffix in ("lora_down.weight", "lora_up.weight"):
            other = "lora_up.weight" if suffix == "lora_down.weight" else "lora_down.weight"
            if f"{name}.{other}" not in weights:
                raise CheckpointError(source, message=f"{key} has no {other} beside it")
    return ranks


def check_fit(weights: Mapping[str, Tensor], ranks: Mapping[str, int], source: str) -> None:
    """Compare the ranks of a file with those of the network.

    Args:
        weights: the file's tensors.
        ranks: layer name -> rank as stored in files, of this network.
        source: name of the file.

    Raises:
        CheckpointError: a common module has another rank.
    """
    stored = stored_ranks(weights, source)
    different = [
        (name, stored[name].dim, rank) for name, rank in ranks.items() if name in stored and stored[name].dim != rank
    ]
    if different:
        name, in_file, here = different[0]
        raise CheckpointError(
            source,
            message=f"rank {in_file} in the file, {here} here ({name}; {len(different)} modules differ): "
            f"use --dim_from_weights, or --network_dim {in_file}",
        )


def restore_split_alphas(
    weights: dict[str, Tensor], metadata: Mapping[str, str], counts: Mapping[str, int], source: str
) -> dict[str, Tensor]:
    """Give fused projections of the reference's `split_qkv` files the strength they were trained with.

    The reference saves the parts' alpha beside the fused rank, n times larger, so readers apply 1/n of the trained
    change; we save n times alpha. Which of the two a file has shows in `ss_network_alpha`.

    Args:
        weights: the file's tensors.
        metadata: the file's metadata.
        counts: layer name -> number of parts.
        source: name of the file.
    """
    if not _trained_split(metadata):
        return weights
    try:
        trained = float(metadata.get("ss_network_alpha", ""))
    except ValueError:
        return weights
    corrected = dict(weights)
    found = 0
    for name, count in counts.items():
        alpha = weights.get(f"{name}.alpha")
        if alpha is not None and abs(float(alpha) - trained) <= 1e-2 * trained:
            corrected[f"{name}.alpha"] = torch.tensor(float(alpha) * count)
            found += 1
    if found:
        logger.warning(
            "%s: %d split projections carry the alpha of one part (a known mistake of older trainers); "
            "they are used at the strength they were trained with",
            source,
            found,
        )
    return corrected


def _trained_split(metadata: Mapping[str, str]) -> bool:
    try:
        arguments = json.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        return False
    return isinstance(arguments, dict) and str(arguments.get("split_qkv", "")).lower() in ("true", "1", "yes", "on")


def write_weights(
    file: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write an adapter file, complete or not at all; the extension decides between safetensors and torch's format.

    Args:
        file: target.
        state: tensors under their final keys.
        dtype: number format of the file; unchanged when None.
        metadata: text entries; the hashes `sshs_model_hash` and `sshs_legacy_hash` are added to a copy.
    """
    tensors = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in state.items()}
    if Path(file).suffix.lower() in _PICKLE_SUFFIXES:
        with atomic_path(file) as temporary:
            try:
                torch.save(tensors, temporary)
            except RuntimeError as error:  # what torch's writer makes of a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
        return
    entries = dict(metadata or {})
    entries["sshs_model_hash"], entries["sshs_legacy_hash"] = adapter_hashes(tensors, entries)
    save_file_atomic(tensors, file, entries)
