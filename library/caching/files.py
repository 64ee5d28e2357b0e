"""Cache files: named arrays in one `.npz` or `.safetensors` file, read without copies that are not needed.

The `.npz` layout is numpy's (stored, not compressed), so other programs read ours and we read theirs. In `.safetensors`
files floating-point tensors are bfloat16: half the size.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.base.safetensors_io import save_tensors

FORMATS = ("npz", "safetensors")
_LOCAL_HEADER = 30  # bytes before the name of a zip member; name and extra lengths are its last two 16-bit numbers


class CacheDamaged(Exception):
    """A cache file is truncated, not a cache file, or fails its checksum."""


@dataclass(frozen=True)
class _Member:
    offset: int  # of the array's first byte in the file
    shape: tuple[int, ...]
    dtype: np.dtype


class CacheFile:
    """An open cache file; use it as a context manager.

    Attributes:
        path: the file.
        shapes: array name -> shape.

    Raises:
        CacheDamaged: on opening or reading; truncation is always seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: BinaryIO | None = None
        self._safe = None
        self._members: dict[str, _Member] = {}
        if path.suffix == ".safetensors":
            try:
                self._safe = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CacheDamaged(str(error)) from error
            self.shapes = {name: tuple(self._safe.get_slice(name).get_shape()) for name in self._safe.keys()}  # noqa: SIM118
            return
        try:
            self._opened = open(path, "rb")
            self._members = _members(self._opened)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            self.close()
            raise CacheDamaged(str(error)) from error
        self.shapes = {name: member.shape for name, member in self._members.items()}

    def __enter__(self) -> "CacheFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def close(self) -> None:
        """Let go of the file; what was read stays valid."""
        if self._opened is not None:
            self._opened.close()
        self._safe = None

    def read(self, name: str) -> Tensor:
        """One array, in the number format of the file."""
        if self._safe is not None:
            try:
                return self._safe.get_tensor(name)
            except SafetensorError as error:
                raise CacheDamaged(str(error)) from error
        member = self._members[name]
        assert self._opened is not None
        self._opened.seek(member.offset)
        values = np.empty(member.shape, member.dtype)
        # through memoryview: one copy from the page cache into the array, no buffer between
        read = self._opened.readinto(memoryview(values.reshape(-1)).cast("B")) if values.nbytes else 0
        if read != values.nbytes:
            raise CacheDamaged(f"ends in the middle of {name}")
        return torch.from_numpy(values)

    def verify(self) -> None:
        """Read everything and compare checksums (`.npz`; the other format has none).

        Raises:
            CacheDamaged: a checksum differs.
        """
        if self._safe is not None:
            for name in self.shapes:
                self.read(name)
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                wrong = archive.testzip()
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise CacheDamaged(str(error)) from error
        if wrong is not None:
            raise CacheDamaged(f"checksum of {wrong} differs")


def _members(file: BinaryIO) -> dict[str, _Member]:
    """Where the arrays of an .npz lie.

    Raises:
        ValueError, zipfile.BadZipFile: not such a file, truncated, or compressed.
    """
    size = os.fstat(file.fileno()).st_size
    members = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("is compressed")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{entry.filename} is not where the directory says")
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + skip
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        offset = file.tell()
        length = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if (fortran and len(shape) > 1) or dtype.hasobject:
            raise ValueError(f"{entry.filename} has a layout that caches never have")
        if offset + length != start + entry.file_size or offset + length > size:
            raise ValueError(f"{entry.filename} is truncated")
        members[entry.filename.removesuffix(".npy")] = _Member(offset, shape, dtype)
    return members


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """As `atomic_path`, but without waiting for the disk: a cache that a power cut takes is made again."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_cache(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write a cache file, complete or not at all; the suffix decides the format.

    bfloat16 becomes float32 in `.npz` (numpy has none); floats become bfloat16 in `.safetensors`.

    Raises:
        OSError: it cannot be written.
    """
    with _replaced(path) as temporary:
        if path.suffix == ".safetensors":
            compact = {
                # fingerprints and crop boxes must come back exactly
                name: value.to(torch.bfloat16) if value.dtype in (torch.float32, torch.float16) else value
                for name, value in arrays.items()
            }
            save_tensors({name: value.contiguous() for name, value in compact.items()}, temporary)
        else:
            plain = {
                name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
                for name, value in arrays.items()
            }
            with open(temporary, "wb") as file:  # given a name, numpy would add .npz to it
                np.savez(file, **plain)


def sweep_leftovers(folder: Path, is_alive: Callable[[int], bool]) -> int:
    """Remove temporary cache files that killed processes left; returns how many.

    Args:
        folder: where caches are written.
        is_alive: whether a process with this id runs.
    """
    count = 0
    for suffix in FORMATS:
        for file in folder.glob(f".*.{suffix}.*.tmp"):
            owner = file.name.split(".")[-2]
            if owner.isdecimal() and not is_alive(int(owner)):
                file.unlink(missing_ok=True)
                count += 1
    return count
