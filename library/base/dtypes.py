"""Names of number formats, as they appear in flags and files."""

import torch

_NAMES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def dtype_from_name(name: str | None) -> torch.dtype | None:
    """The dtype a flag value names ("no" means float32); None stays None."""
    return None if name is None else _NAMES[name]
