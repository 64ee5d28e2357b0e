"""Training states on disk: a folder that is there completely or not at all.

`state.json` holds counters and what the state belongs to; `weights.safetensors`, `optimizer.safetensors` and
`optimizer.json` hold what is trained and how. `train_state.json` says where the run was in the words of sd-scripts.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.errors import CheckpointError
from library.base.safetensors_io import load_file, save_tensors

FORMAT = 1
HEAD = "state.json"
_WEIGHTS = "weights.safetensors"
_TENSORS = "optimizer.safetensors"
_STRUCTURE = "optimizer.json"
_FOREIGN = ("optimizer.bin", "random_states_0.pkl", "scheduler.bin")


@dataclass
class SavedState:
    """Content of a state.

    Attributes:
        head: counters, identities, everything small.
        weights: what is trained, by name.
        optimizer: the optimizer's `state_dict`; None in a state that holds none that fits here.
        foreign: whether another program wrote it.
    """

    head: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    foreign: bool = False


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested structure as JSON; its tensors go into `tensors` under names that begin with `name`.

    Raises:
        TypeError: something that is neither a container, a number, a text nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, encode(one, f"{name}.{key}", tensors)] for key, one in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(one, f"{name}.{number}", tensors) for number, one in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if hasattr(value, "item"):  # a number of numpy's
        return {"value": value.item()}
    raise TypeError(f"{name} is a {type(value).__name__}, which a state cannot hold")


def decode(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode`."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(one, tensors) for key, one in content}
    if kind in ("list", "tuple"):
        made = [decode(one, tensors) for one in content]
        return made if kind == "list" else tuple(made)
    return content


def write_state(folder: Path, state: SavedState) -> None:
    """Write a state; an older one of the same name goes when the new one is complete.

    Raises:
        OSError: it cannot be written; the older one is still there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    tensors: dict[str, Tensor] = {}
    structure = encode(state.optimizer, "optimizer", tensors)
    try:
        temporary.mkdir()
        save_tensors(
            {name: one.detach().cpu().contiguous() for name, one in state.weights.items()}, temporary / _WEIGHTS
        )
        save_tensors(tensors, temporary / _TENSORS)
        _write_json(temporary / _STRUCTURE, structure)
        counters = {"current_epoch": state.head["epoch"], "current_step": state.head["step"]}
        _write_json(temporary / "train_state.json", counters)
        _write_json(temporary / HEAD, {"format": FORMAT, **state.head})
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Folders cannot be replaced in one go: the old one steps aside first, and `recover` brings it back if need be."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(temporary, folder)
    shutil.rmtree(aside, ignore_errors=True)


def present(folder: Path) -> Path:
    """The folder of a state, or where it stepped aside to when its run was killed at that very moment."""
    aside = _aside(folder)
    return aside if not folder.exists() and aside.is_dir() else folder


def recover(parent: Path) -> None:
    """Bring back states that had stepped aside when their run was killed; only while no other run is at work there."""
    if not parent.is_dir():
        return
    for aside in parent.glob(".*-state.old"):
        place = parent / aside.name[1:].removesuffix(".old")
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, place)


def sweep_half_written(folder: Path, base: str, is_alive: Callable[[int], bool]) -> int:
    """Remove what killed runs of a name were writing: `.<base>...<process>.tmp`; returns how many.

    Args:
        folder: of the results.
        base: `--output_name`.
        is_alive: whether a process with this id runs.
    """
    count = 0
    for path in folder.glob(f".{glob.escape(base)}*.tmp"):
        owner = path.name.split(".")[-2]
        if not owner.isdecimal() or is_alive(int(owner)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        count += 1
    return count


def read_head(folder: Path) -> dict[str, Any]:
    """What a state says of itself.

    Raises:
        CheckpointError: no state, a damaged one, or one of a later version.
    """
    where = "--resume"
    if not folder.is_dir():
        raise CheckpointError(where, str(folder), "no such folder; a state is a folder whose name ends in -state")
    if not (folder / HEAD).is_file():
        if any((folder / name).is_file() for name in _FOREIGN):
            return _foreign_head(folder)
        raise CheckpointError(where, str(folder), f"holds no training state (no {HEAD})")
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        version = head["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(where, str(folder / HEAD), f"is damaged ({error}); use an earlier state") from error
    if version != FORMAT:
        raise CheckpointError(where, str(folder), f"has format {version}; this version reads format {FORMAT}")
    missing = [name for name in (_WEIGHTS, _TENSORS, _STRUCTURE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(where, str(folder), f"lacks {', '.join(missing)}; use an earlier state")
    return head


def read_state(folder: Path) -> SavedState:
    """A whole state.

    Raises:
        CheckpointError: see `read_head`; damaged tensors.
    """
    head = read_head(folder)
    if head.get("foreign"):
        return _read_foreign(folder, head)
    weights = load_file(folder / _WEIGHTS)
    tensors = load_file(folder / _TENSORS)
    try:
        structure = json.loads((folder / _STRUCTURE).read_text(encoding="utf-8"))
        optimizer = decode(structure, tensors)
    except (ValueError, KeyError, TypeError, OSError) as error:
        message = f"is damaged ({error}); use an earlier state"
        raise CheckpointError("--resume", str(folder / _STRUCTURE), message) from error
    return SavedState(head, weights, optimizer)


def _foreign_head(folder: Path) -> dict[str, Any]:
    """Where a run of sd-scripts was: it says its step, and nothing of its data."""
    head: dict[str, Any] = {"foreign": True, "step": 0, "epoch": 1}
    try:
        counters = json.loads((folder / "train_state.json").read_text(encoding="utf-8"))
        head |= {"step": int(counters["current_step"]), "epoch": int(counters["current_epoch"])}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError("--resume", str(folder / "train_state.json"), f"is damaged: {error}") from error
    return head


def _read_foreign(folder: Path, head: dict[str, Any]) -> SavedState:
    """Weights and optimizer of a state in accelerate's layout; code in its pickles is never run."""
    weights = load_file(folder / "model.safetensors")
    optimizer = None
    if (folder / "optimizer.bin").is_file():
        try:
            optimizer = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
        except Exception as error:
            message = (
                "cannot be read as weights only: it holds code or is damaged; remove it to start the optimizer anew"
            )
            raise CheckpointError("--resume", str(folder / "optimizer.bin"), message) from error
    return SavedState(head, weights, optimizer, foreign=True)


def find_states(parent: Path, base: str) -> list[Path]:
    """Folders of states of a run's name, the furthest last; damaged ones are left out."""
    found = []
    asides = {parent / place.name[1:].removesuffix(".old") for place in parent.glob(".*-state.old")}
    for folder in sorted({*parent.glob("*-state"), *asides}) if parent.is_dir() else []:
        if not (folder.name == f"{base}-state" or folder.name.startswith(f"{base}-")):
            continue
        try:
            head = read_head(present(folder))
        except CheckpointError:
            continue
        if not head.get("foreign") and head.get("output_name") == base:
            found.append((head["step"], (present(folder) / HEAD).stat().st_mtime_ns, folder))
    return [folder for _, _, folder in sorted(found)]
