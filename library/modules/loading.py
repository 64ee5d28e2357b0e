"""Build a module without memory, then fill it tensor by tensor from a mapped file."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from library.base.errors import CheckpointError
from library.base.safetensors_io import TensorFile
from library.modules.quantize import is_fp8, put_fp8

Reader = Callable[[], Tensor]


def open_model_file(flag: str, path: str) -> TensorFile:
    """The file that a flag names.

    Raises:
        CheckpointError: no such file, a folder, or a name on the hub.
    """
    place = Path(path)
    if place.is_dir():
        raise CheckpointError(flag, path, "is a folder; this version reads single files (.safetensors)")
    if not place.is_file():
        hint = (
            "; if it is a name on the hub, download its single file first"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", path)
            else ""
        )
        raise CheckpointError(flag, path, f"no such file{hint or '; correct the path'}")
    return TensorFile(place)


def readers(file: TensorFile, names: Mapping[str, str]) -> dict[str, Reader]:
    """Deferred reads: module tensor name -> reader of the file tensor `names` maps it to."""
    return {ours: (lambda stored=stored: file.tensor(stored)) for ours, stored in names.items()}


def load_module(
    build: Callable[[], nn.Module],
    tensors: Mapping[str, Reader],
    *,
    path: Path,
    part: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """A module made by `build` with the given tensors in `dtype` on `device`.

    The module is built on the meta device; each tensor goes straight from the file's mapping to its final place, so no
    second copy of the weights ever exists.

    Args:
        build: makes the module.
        tensors: readers by the module's own names.
        path: of the file, for messages.
        part: what the module is, for messages.
        dtype: of its weights.
        device: of its weights.
        prepare: changes the empty module, such as how it keeps its weights.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, the first ten of each.
    """
    with init_empty_weights(include_buffers=False):
        module = build()
        if prepare is not None:
            prepare(module)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_names(expected, tensors, path, part)
    for name, shape in expected.items():
        tensor = tensors[name]()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                str(path),
                message=f"{part}: {name} has shape {list(tensor.shape)}, expected {list(shape)}; use another file",
            )
        owner = module.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and is_fp8(owner):
            put_fp8(owner, tensor, device)
            continue
        value = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        _place(module, name, value)
    return module.requires_grad_(False).eval()


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor where the module has an empty one of this name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _check_names(expected: Iterable[str], found: Iterable[str], path: Path, part: str) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if not missing and not unexpected:
        return
    texts = []
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            texts.append(f"{len(names)} {word}: {', '.join(names[:10])}{more}")
    raise CheckpointError(
        str(path), message=f"does not hold the tensors of the {part}; " + "; ".join(texts) + "; name a complete file"
    )


def highest_index(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches at the start of a name; 0 when none does."""
    compiled = re.compile(pattern)
    return 1 + max((int(match[1]) for name in names if (match := compiled.match(name))), default=-1)


def merge_config(inferred: Mapping[str, Any], file: TensorFile, *, fixed: Iterable[str]) -> dict[str, Any]:
    """Inferred sizes, overridden by the `config` entry of the file's metadata.

    Args:
        inferred: sizes read from tensor shapes and published proportions.
        file: checkpoint whose metadata may hold `config` (JSON).
        fixed: keys that shapes decide; a `config` that contradicts them is an error.

    Raises:
        CheckpointError: unreadable JSON, an unknown key, or a contradiction.
    """
    text = file.metadata.get("config")
    if not text:
        return dict(inferred)
    try:
        given = json.loads(text)
    except ValueError as error:
        raise CheckpointError(str(file.path), message="its metadata entry `config` is not JSON") from error
    for key in fixed:
        if key in given and _plain(given[key]) != _plain(inferred.get(key)):
            raise CheckpointError(
                str(file.path),
                message=f"metadata `config` says {key} = {given[key]!r}, but tensor shapes say {inferred.get(key)!r}",
            )
    return {**inferred, **{key: value for key, value in given.items() if key in inferred}}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
