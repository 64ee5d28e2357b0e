"""What a cached value was made from, as small integer arrays that travel in the cache file.

Other programs ignore these arrays; files without them are taken as they are.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def digest(*parts: object) -> tuple[int, int]:
    """Two signed 64-bit numbers (blake2b) that stand for the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return _numbers(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def _numbers(raw: bytes) -> tuple[int, int]:
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:], "little", signed=True)


def as_tensor(numbers: tuple[int, ...]) -> Tensor:
    """[N] int64."""
    return torch.tensor(numbers, dtype=torch.int64)


@dataclass(frozen=True)
class Source:
    """An image file: size in bytes, time of change in nanoseconds, and the digest of its content."""

    size: int
    changed: int
    content: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Read the file."""
        stat = path.stat()
        with open(path, "rb") as file:
            content = _numbers(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        return cls(stat.st_size, stat.st_mtime_ns, content)

    @classmethod
    def from_tensor(cls, values: Tensor) -> "Source":
        """The inverse of `tensor`."""
        size, changed, first, second = values.tolist()
        return cls(size, changed, (first, second))

    def tensor(self) -> Tensor:
        """[4] int64."""
        return as_tensor((self.size, self.changed, *self.content))

    def matches(self, path: Path) -> bool:
        """Whether the file still has this content; it is read only when its time of change differs."""
        stat = path.stat()
        if stat.st_size != self.size:
            return False
        return stat.st_mtime_ns == self.changed or Source.of(path).content == self.content
