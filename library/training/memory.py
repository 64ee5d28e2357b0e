"""How much memory a run needs, roughly, against what there is."""

import os
from collections.abc import Iterable

import torch
from torch import nn


def module_bytes(modules: Iterable[nn.Module | None]) -> int:
    """Bytes of all parameters and buffers."""
    seen: dict[int, int] = {}
    for module in modules:
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or of the machine for the CPU; None where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_bytes(device: torch.device) -> int:
    """Largest use so far: of the device, or of this process on the CPU (0 where it cannot be asked)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def readable(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
