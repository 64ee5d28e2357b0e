"""Hashes that other tools use to recognise models and adapters."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

_LEGACY_OFFSET = 0x100000
_LEGACY_LENGTH = 0x10000


def adapter_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of an adapter file.

    The file is serialised with its `ss_*` metadata alone. The first value is the sha256 of what follows the header; the
    second the first 8 hex digits of the sha256 of 64 KiB at offset 1 MiB (nothing, for smaller files).
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata=kept)
    header = 8 + int.from_bytes(data[:8], "little")
    legacy = data[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_LENGTH]
    return hashlib.sha256(memoryview(data)[header:]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]


def model_hashes(path: str | Path) -> tuple[str, str]:
    """(legacy 8-digit hash, full sha256) of a checkpoint file, as written to `ss_sd_model_hash` and its new form."""
    path = Path(path)
    with open(path, "rb") as file:
        file.seek(_LEGACY_OFFSET)
        legacy = hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]
        file.seek(0)
        full = hashlib.file_digest(file, "sha256").hexdigest()
    return legacy, full
