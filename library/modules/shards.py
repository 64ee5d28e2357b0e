"""Checkpoints in several files that are read as one."""

import re
from pathlib import Path

from torch import Tensor

from library.base.errors import CheckpointError
from library.base.safetensors_io import TensorFile
from library.modules.loading import open_model_file

_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.\w+)")


class TensorShards(TensorFile):
    """The tensors of several files under the interface of one.

    Args:
        paths: of the files; the first stands for all in messages.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths[0])
        self._shards = [TensorFile(path) for path in paths]
        self.shapes = {name: shape for shard in self._shards for name, shape in shard.shapes.items()}
        self._owners = {name: shard for shard in self._shards for name in shard.shapes}

    def tensor(self, name: str) -> Tensor:
        """One tensor; its memory is a private mapping of its file."""
        return self._owners[name].tensor(name)

    def _first_values(self, name: str) -> list[float]:
        return self._owners[name]._first_values(name)


def open_sharded(flag: str, path: str) -> TensorFile:
    """The file that a flag names; of a file named `...-00001-of-00003...` all that belong to it.

    Raises:
        CheckpointError: no such file, a part that is missing, a folder, or a name on the hub.
    """
    match = _SHARD.fullmatch(Path(path).name)
    if match is None:
        return open_model_file(flag, path)
    start, _, count, end = match.groups()
    paths = [Path(path).with_name(f"{start}{number:05d}-of-{count}{end}") for number in range(1, int(count) + 1)]
    for part in paths:
        if not part.is_file():
            raise CheckpointError(flag, path, f"is in {int(count)} files, and {part.name} is not beside it")
    return TensorShards(paths)
