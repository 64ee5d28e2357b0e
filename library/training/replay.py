"""Record the inputs of every micro-step, and train on a record again.

Layout of a record: `step_{n:06d}.safetensors` per micro-step with latents, noise, noisy, timesteps (and sigmas in flow
families; `extra` where the model sees further channels); one line per micro-step in `steps.jsonl`; `meta.json`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.errors import Problem, UserError, raise_problems
from library.base.randomness import address
from library.base.safetensors_io import load_file, read_header, save_file_atomic, write_text_atomic
from library.batch import ItemAddress, StepInputs, TrainBatch
from library.data.dataset import TrainDataset, View
from library.data.loader import Window
from library.strategy_base import DenoisingStrategy

_TENSORS = ("latents", "noise", "noisy", "timesteps", "sigmas", "extra")
FORMAT = 1


def _tensor_file(folder: Path, number: int) -> Path:
    return folder / f"step_{number:06d}.safetensors"


class StepRecorder:
    """Writes a record.

    Args:
        folder: new or empty folder.
        meta: content of `meta.json` besides the format.
        keep: micro-steps of an earlier run that stay, when this one goes on from there; None needs a new folder.
    """

    def __init__(self, folder: str, meta: Mapping[str, Any], keep: int | None = None) -> None:
        self.folder = Path(folder)
        if keep is None and self.folder.is_dir() and any(self.folder.glob("step_*.safetensors")):
            raise UserError("--record_steps", folder, "holds a record already; name another folder or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        if keep is not None:
            self._cut_back(keep)
        write_text_atomic(self.folder / "meta.json", json.dumps({"format": FORMAT, **meta}, indent=1))
        self._lines = open(self.folder / "steps.jsonl", "a" if keep is not None else "w", encoding="utf-8")

    def _cut_back(self, keep: int) -> None:
        """Only the first `keep` micro-steps stay; what the earlier run recorded beyond its state happens again."""
        path = self.folder / "steps.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            try:
                number = json.loads(line)["step"]
            except (ValueError, KeyError):
                continue  # the last line of a killed run
            if number < keep:
                kept.append(line + "\n")
        write_text_atomic(path, "".join(kept))
        for file in self.folder.glob("step_*.safetensors"):
            if int(file.stem.removeprefix("step_")) >= keep:
                file.unlink()

    def write(self, number: int, inputs: StepInputs, loss: float, rates: Mapping[str, float]) -> None:
        """Add micro-step `number` (from 0)."""
        tensors = {name: getattr(inputs, name) for name in _TENSORS if getattr(inputs, name) is not None}
        save_file_atomic({name: t.cpu() for name, t in tensors.items()}, _tensor_file(self.folder, number))
        batch = inputs.batch
        line = {
            "step": number,
            "epoch": batch.items[0].epoch,
            "image_keys": batch.image_keys,
            "subset": batch.subsets,
            "captions": batch.captions,
            "loss": loss,
            "loss_weights": batch.loss_weights.tolist(),
            "timesteps": inputs.timesteps.tolist(),
            "flipped": batch.flipped,
            "pixel_crop": batch.pixel_crops.tolist(),
            "original_sizes_hw": batch.original_sizes.tolist(),
            "crop_top_lefts": batch.crop_top_lefts.tolist(),
            "target_sizes_hw": batch.target_sizes.tolist(),
            "text_drop": {name: tensor.tolist() for name, tensor in inputs.draws.items()},
            "lr": dict(rates),
        }
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Finish the record."""
        self._lines.close()


class FailureWriter:
    """Writes the inputs of a step that went wrong as a record of its own, to look at or to replay.

    Args:
        folder: start of the folders' names.
        meta: as of a record.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.meta = meta

    def write(self, step: int, inputs: Sequence[StepInputs], losses: Sequence[float]) -> Path:
        """The micro-steps of optimizer step `step` (from 1); returns the folder."""
        folder = self.folder.with_name(f"{self.folder.name}{step:08d}")
        recorder = StepRecorder(str(folder), self.meta, keep=0)
        for number, (one, loss) in enumerate(zip(inputs, losses)):
            recorder.write(number, one, loss, {})
        recorder.close()
        return folder


class Replay:
    """A record as training data: windows of recorded batches, and their inputs.

    There are no epochs; micro-steps come in the order of the record.

    Args:
        folder: the record.
        dataset: of the options; gives images' sizes, weights and subsets.
        denoising: of the family, for targets and loss weights.
        accumulation: micro-steps per optimizer step.
        max_steps: optimizer steps at most.
        device: where the model computes.
        seed: of the run, for draws inside modules.
    """

    def __init__(
        self,
        folder: str,
        dataset: TrainDataset,
        denoising: DenoisingStrategy,
        *,
        accumulation: int,
        max_steps: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.folder = Path(folder)
        self.dataset = dataset
        self.denoising = denoising
        self.accumulation = accumulation
        self.device = device
        self.seed = seed
        lines = read_lines(folder)
        self.lines = lines[: max_steps * accumulation]
        self._drawn = {line["step"]: line.get("text_drop") or {} for line in self.lines}
        self.items = self._find_items()

    @property
    def num_batches(self) -> int:
        """Micro-steps that are replayed."""
        return len(self.lines)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that are replayed; they count as one epoch."""
        return -(-len(self.lines) // self.accumulation)

    def captions(self) -> list[str]:
        """Every caption of the record."""
        return [caption for line in self.lines for caption in line["captions"]]

    def _find_items(self) -> list[list[ItemAddress]]:
        """The images of every micro-step.

        Raises:
            UserError: images that are missing or ambiguous, shapes or weights that do not fit; all together.
        """
        places: dict[str, list[ItemAddress]] = {}
        for number, images in enumerate(self.dataset.sets):
            for index, record in enumerate(images.records):
                item = ItemAddress(number, record.subset, index, record.key, 0, 1)
                places.setdefault(record.key, []).append(item)
        problems: list[Problem] = []
        found = []
        for line in self.lines:
            items = [
                self._find(places.get(key, []), key, _entry(line.get("subset"), position), line, problems)
                for position, key in enumerate(line["image_keys"])
            ]
            present = [item for item in items if item is not None]
            if len(present) == len(items):
                problems += self._fit_problems(line, present)
            found.append(present)
        raise_problems(problems)
        return found

    def _find(
        self,
        candidates: Sequence[ItemAddress],
        key: str,
        subset: str | None,
        line: Mapping[str, Any],
        problems: list[Problem],
    ) -> ItemAddress | None:
        where = f"{self.folder} step {line['step']}"
        if subset is not None:
            candidates = [item for item in candidates if self.dataset.sets[item.dataset].subset_of(item).name == subset]
        size = read_header(_tensor_file(self.folder, line["step"]))[0]["latents"].shape[-2:]
        if len(candidates) > 1:  # several datasets may show one image at different sizes
            candidates = [item for item in candidates if self._latent_size(item) == tuple(size)] or candidates
        if not candidates:
            problems.append(Problem(where, f"the dataset has no image {key!r}" + (f" in {subset!r}" if subset else "")))
            return None
        if len(candidates) > 1:
            problems.append(Problem(where, f"several subsets hold an image {key!r}, and the record names no subset"))
            return None
        return candidates[0]

    def _latent_size(self, item: ItemAddress) -> tuple[int, int]:
        width, height = self.dataset.placement(item).bucket
        return height // self.denoising.spatial_factor, width // self.denoising.spatial_factor

    def _fit_problems(self, line: Mapping[str, Any], items: Sequence[ItemAddress]) -> Iterator[Problem]:
        where = f"{self.folder} step {line['step']}"
        shape = read_header(_tensor_file(self.folder, line["step"]))[0]["latents"].shape
        for item in items:
            expected = (len(items), self.denoising.latent_channels, *self._latent_size(item))
            if tuple(shape) != expected:
                yield Problem(where, f"recorded latents are {list(shape)}, but {item.key} gives {list(expected)}")
        weights = [self.dataset.loss_weight(item) for item in items]
        if [round(w, 6) for w in weights] != [round(w, 6) for w in line["loss_weights"]]:
            yield Problem(where, f"loss weights are {weights} with these options, {line['loss_weights']} in the record")

    def _batch(self, line: Mapping[str, Any], items: list[ItemAddress]) -> TrainBatch:
        flipped = line.get("flipped") or [False] * len(items)
        crops = line.get("pixel_crop") or [None] * len(items)
        views = [self._view(item, flip, crop) for item, flip, crop in zip(items, flipped, crops)]
        return self.dataset.describe(items, list(line["captions"]), flipped, line["step"], views)

    def _view(self, item: ItemAddress, flipped: bool, crop: Sequence[int] | None) -> View:
        """Masks and control images come from the files, cut as recorded; the images themselves are not needed."""
        placement = self.dataset.placement(item)
        if crop is not None:
            placement = replace(placement, crop=(crop[0], crop[1]), resized=(crop[2], crop[3]))
        masked = self.dataset.subset(item).alpha_mask
        view = self.dataset.view(item, flipped, pixels=masked, placement=placement)
        view.pixels = None
        return view

    def windows(self, epoch: int, *, start: int = 0, step: int = 0) -> Iterator[Window]:
        """Recorded batches, `accumulation` per window."""
        del step
        total = len(self.lines)
        for low in range(start, total, self.accumulation):
            high = min(low + self.accumulation, total)
            batches = (self._batch(self.lines[n], self.items[n]) for n in range(low, high))
            yield Window(batches, high - low, epoch, low, is_last=high == total)

    def assemble(self, batch: TrainBatch) -> StepInputs:
        """Inputs of a recorded batch; target and weight follow from the record and the options."""
        tensors: Mapping[str, Tensor] = load_file(_tensor_file(self.folder, batch.ordinal))
        process = self.denoising.process
        latents, noise, timesteps = tensors["latents"], tensors["noise"], tensors["timesteps"].float()
        sigmas = tensors.get("sigmas")
        return StepInputs(
            batch=batch,
            latents=latents,
            noise=noise,
            noisy=tensors["noisy"],
            timesteps=timesteps,
            sigmas=sigmas,
            target=process.target(latents, noise, timesteps),
            weight=process.weight(timesteps, sigmas),
            module_seed=address(self.seed, "module", 1, batch.ordinal),
            extra=tensors.get("extra"),
            draws={name: torch.tensor(drawn) for name, drawn in self._drawn[batch.ordinal].items()},
        ).to(self.device)


def _entry(value: Any, index: int) -> str | None:
    """A record states the subset per image, or once per step."""
    return value[index] if isinstance(value, list) else value


def read_lines(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a record's `steps.jsonl`.

    Raises:
        UserError: no record there, or files of steps are missing.
    """
    place = Path(folder)
    if not (place / "steps.jsonl").is_file():
        raise UserError("--replay_steps", str(folder), "holds no record (no steps.jsonl)")
    text = (place / "steps.jsonl").read_text(encoding="utf-8")
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError("--replay_steps", str(folder), f"steps.jsonl is damaged: {error}") from error
    missing = [line["step"] for line in lines if not _tensor_file(place, line["step"]).is_file()]
    if missing:
        raise UserError("--replay_steps", str(folder), f"files of steps {missing[:10]} are missing")
    return lines
