"""Files: read without copies, written whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.base import safetensors_io as io
from library.base.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def test_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    io.save_file_atomic(tensors, tmp_path / "x.safetensors", {"k": "v"})
    infos, metadata = io.read_header(tmp_path / "x.safetensors")
    assert (infos["a"].shape, infos["a"].dtype, metadata["k"]) == ((3, 4), "F32", "v")
    loaded = io.load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save_file_atomic({"a": torch.zeros(1)}, path)

    with pytest.raises(RuntimeError), io.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert io.load_file(path)["a"].tolist() == [0.0]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"abc", "shorter than 8 bytes"),
        (b"\xff" * 64, "no header found"),
        (b"\x10" + b"\0" * 7 + b"no json at all!!", "damaged"),
    ],
)
def test_files_that_are_none(tmp_path, content, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        io.TensorFile(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "x.safetensors"
    io.save_file_atomic({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="where its header promises"):
        io.TensorFile(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        io.TensorFile(tmp_path / "x.safetensors")


def test_pickles_are_read_without_running_code(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    assert io.load_file(tmp_path / "x.ckpt")["a"].tolist() == [1.0, 1.0]

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"a": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as weights only"):
        io.load_file(tmp_path / "evil.ckpt")
    assert not (tmp_path / "touched").exists()


LOAD = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from library.base.safetensors_io import TensorFile
from library.modules.loading import load_module, readers

class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(48))

def anonymous():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

file = TensorFile(sys.argv[1])
dtype = getattr(torch, sys.argv[2])
before = anonymous()
model = load_module(Big, readers(file, {n: n for n in file.names}), path=file.path, part="test", dtype=dtype)
wanted = sum(p.numel() * p.element_size() for p in model.parameters())
print((anonymous() - before) / wanted)
"""


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.05), ("bfloat16", 1.05), ("float16", 0.05)])
def test_loading_takes_no_second_copy(tmp_path, dtype, most):
    """Anonymous memory for a file of half precision; the file's own format needs none, its pages are the file's."""
    tensors = {f"layers.{n}.weight": torch.zeros(1024, 1024, dtype=torch.float16) for n in range(48)}
    io.save_file_atomic(tensors, tmp_path / "big.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "big.safetensors"), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) <= most


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    """The safetensors library would keep them from everybody else, image programs of other users included."""
    before = os.umask(0o022)
    try:
        io.save_file_atomic({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644
