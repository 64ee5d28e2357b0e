"""Reading tensors without copying files into memory, and writing files that are never half there."""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.base.errors import CheckpointError

_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_AGAIN = "; download or copy it again, or name another file"
_NOT_WEIGHTS = "cannot be read as weights only (it holds code or is damaged); use a .safetensors file or convert it"


class KnownShapes(dict[str, tuple[int, ...]]):
    """Shapes by tensor name; asking for one that a file lacks says so.

    Args:
        shapes: by name.
        path: the file.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
        super().__init__(shapes)
        self.path = path

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(str(self.path), message=f"lacks the tensor {name}{_AGAIN}")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and safetensors dtype name ("F32", "BF16", ...) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names, shapes and metadata of a safetensors file, without touching its data.

    Raises:
        CheckpointError: unreadable, truncated, or not a safetensors file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(str(path), message=f"is not a safetensors file (shorter than 8 bytes){_AGAIN}")
            (length,) = struct.unpack("<Q", prefix)
            if length > 100_000_000:
                raise CheckpointError(str(path), message=f"is not a safetensors file (no header found){_AGAIN}")
            header = json.loads(file.read(length))
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise CheckpointError(str(path), message=f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            str(path), message=f"is not a safetensors file, or is damaged (unreadable header){_AGAIN}"
        ) from error
    try:
        metadata = header.pop("__metadata__", {})
        infos = {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        message = f"is not a safetensors file, or is damaged (its header describes no tensors){_AGAIN}"
        raise CheckpointError(str(path), message=message) from error
    if size != 8 + length + end:
        raise CheckpointError(
            str(path), message=f"is damaged: {size} bytes where its header promises {8 + length + end}; copy it again"
        )
    return infos, metadata


class TensorFile:
    """Named tensors of a checkpoint; the data stays on disk until a tensor is asked for.

    Attributes:
        path: the file.
        shapes: tensor name -> shape.
        metadata: text entries of the header (empty for pickles).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(str(path), message="no such file; correct the path or name another file")
        self._pickle: dict[str, Tensor] | None = None
        self._file: Any = None
        if self.path.suffix.lower() in _PICKLE_SUFFIXES:
            self._pickle = _read_pickle(self.path)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._pickle.items()}
            self.metadata: dict[str, str] = {}
            return
        infos, self.metadata = read_header(self.path)
        self.shapes = {name: info.shape for name, info in infos.items()}
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), message=f"cannot be opened: {error}{_AGAIN}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.shapes)

    def num_parameters(self, prefix: str = "") -> int:
        """Elements of all tensors below a prefix."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith(prefix))

    def identity(self, prefix: str = "") -> str:
        """A text that is the same for the same weights below a prefix, whatever file they are in.

        Made from names, shapes and the first values of every tensor: quick, and no two trained models share it.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(name for name in self.names if name.startswith(prefix)):
            values = self._first_values(name)
            digest.update(f"{name.removeprefix(prefix)} {self.shapes[name]} {values}\n".encode())
        return digest.hexdigest()

    def _first_values(self, name: str) -> list[float]:
        if self._pickle is not None:
            return self._pickle[name].flatten()[:8].tolist()
        if not self.shapes[name]:
            return [self._file.get_tensor(name).item()]
        # a slice of the first axis: large tensors are not read whole
        return self._file.get_slice(name)[:1].flatten()[:8].tolist()

    def tensor(self, name: str) -> Tensor:
        """One tensor; its memory is a private mapping of the file."""
        return self._pickle[name] if self._pickle is not None else self._file.get_tensor(name)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a torch file, unwrapped from `state_dict`; code in the pickle is never run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written by torch < 1.6: cannot be mapped
        content = _load_unmapped(path)
    except Exception as error:
        raise CheckpointError(str(path), message=_NOT_WEIGHTS) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if content else {}
    if not tensors:
        raise CheckpointError(str(path), message=f"holds no named tensors{_AGAIN}")
    return tensors


def _load_unmapped(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(str(path), message=_NOT_WEIGHTS) from error


def load_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or torch file, on the CPU."""
    file = TensorFile(path)
    return {name: file.tensor(name) for name in file.names}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`; on success it is flushed to disk and moved into place, else removed.

    Under its final name the file is therefore always complete, whatever kills the process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_file_atomic(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, complete or not at all."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_tensors(contiguous, temporary, metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' writer.

    Raises:
        OSError: it cannot be written; the library's own error hides the reason's number.
    """
    # the library makes files that only their owner may read; those that open() makes follow the user's umask
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
