"""Pictures of what is trained on: contact sheets per bucket, lines per visit, and a chart of the buckets."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.base.errors import UserError
from library.base.safetensors_io import atomic_path
from library.batch import ItemAddress
from library.data.dataset import ImageSet, ReadSettings, TrainDataset, View
from library.data.order import epoch_batches

GAP = 6  # pixels around every cell
_TEXT_LINES, _TEXT_SIZE = 4, 11
_BACKGROUND, _INK, _EMPTY = (24, 24, 24), (230, 230, 230), (90, 40, 40)
_DIMMED = 0.25  # brightness of what a mask leaves out
_MAX_COLUMNS = 8
_BUCKETS_SHOWN = 60  # a chart of more bars cannot be read


def contact_sheet(views: Sequence[tuple[np.ndarray, str]], *, columns: int, cell: int) -> Image.Image:
    """Thumbnails in rows, each with a short text below.

    The first cell begins at (GAP, GAP); cells of a row are `cell + GAP` apart. Pictures larger than a cell are shrunk,
    smaller ones are shown as they are, centred in the width of their cell.

    Args:
        views: [h, w, 3] uint8 and the text of each; of longer texts only the beginning is shown.
        columns: cells per row.
        cell: width and largest height of a picture, in pixels.
    """
    columns = max(1, min(columns, len(views)))
    font = ImageFont.load_default(_TEXT_SIZE)
    line = _TEXT_SIZE + 3
    rows = [
        [(_shrunk(pixels, cell), text) for pixels, text in views[start : start + columns]]
        for start in range(0, len(views), columns)
    ]
    heights = [max(picture.height for picture, _ in row) + _TEXT_LINES * line + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + sum(heights)), _BACKGROUND)
    letters = max(4, int(cell / font.getlength("n")))
    top = GAP
    for row, height in zip(rows, heights):
        below = top + max(picture.height for picture, _ in row)
        for column, (picture, text) in enumerate(row):
            left = GAP + column * (cell + GAP)
            sheet.paste(picture, (left + (cell - picture.width) // 2, top))
            # on a field of its own, since a line of wide letters would run into the next cell
            words = Image.new("RGB", (cell, _TEXT_LINES * line), _BACKGROUND)
            ImageDraw.Draw(words).multiline_text(
                (0, 0), "\n".join(_wrapped(text, letters)), fill=_INK, font=font, spacing=2
            )
            sheet.paste(words, (left, below + 2))
        top += height
    return sheet


def _shrunk(pixels: np.ndarray, cell: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((cell, cell))
    return picture


def _wrapped(text: str, letters: int) -> list[str]:
    """The first lines of a text; its own line breaks stay."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""]]
    if len(lines) <= _TEXT_LINES:
        return lines
    return [*lines[: _TEXT_LINES - 1], lines[_TEXT_LINES - 1][: letters - 3] + "..."]


def shown(view: View) -> np.ndarray:
    """A view as a picture [h, w, 3] uint8: what its mask leaves out is dimmed, a control image stands to the right.

    Args:
        view: with pixels.
    """
    assert view.pixels is not None
    pixels = view.pixels
    if view.mask is not None:
        share = _DIMMED + (1 - _DIMMED) * view.mask[..., None].astype(np.float32) / 255
        pixels = (pixels * share + 0.5).astype(np.uint8)
    return pixels if view.control is None else np.concatenate((pixels, view.control), axis=1)


def _cell(dataset: TrainDataset, item: ItemAddress, step: int, cell: int) -> tuple[np.ndarray, str]:
    """Picture and text of one visit; a red field where there is no image."""
    flipped = dataset.is_flipped(item)
    title = Path(item.key).name + (" (flipped)" if flipped else "")
    caption = dataset.caption(item, step) or "(no caption)"
    bucket = dataset.placement(item).bucket
    try:
        if not dataset.record(item).exists:
            raise UserError(item.key, message="the image is not there, only its cache")
        picture = shown(dataset.view(item, flipped))
    except UserError as error:
        picture = np.full((bucket[1], bucket[0], 3), _EMPTY, np.uint8)
        caption = error.problems[0].message
    # kept small: a sheet of large views would need gigabytes
    return np.asarray(_shrunk(picture, cell)), f"{title}\n{caption}"


def write_sheets(
    dataset: TrainDataset,
    batches: Sequence[tuple[ItemAddress, ...]],
    folder: Path,
    *,
    name: str,
    first_step: int = 0,
    limit: int = 64,
    cell: int = 192,
) -> list[Path]:
    """One PNG per dataset and bucket, of what is really trained on: resized, cut, mirrored, with the text of the visit.

    Args:
        dataset: reads the images.
        batches: visits in the order of training.
        folder: where `<name>_dataset<i>_<width>x<height>.png` goes; made where it is missing.
        name: what file names begin with.
        first_step: optimizer steps before the first batch, for caption warm-up; each batch counts as one more.
        limit: visits shown per bucket, the first ones.
        cell: size of a thumbnail in pixels.

    Raises:
        UserError: the folder cannot be written to.
    """
    chosen: dict[tuple[int, tuple[int, int]], list[tuple[ItemAddress, int]]] = defaultdict(list)
    for number, batch in enumerate(batches):
        for item in batch:
            visits = chosen[item.dataset, dataset.sets[item.dataset].placements[item.record].bucket]
            if len(visits) < limit:
                visits.append((item, first_step + number))
    paths = []
    for (index, bucket), visits in sorted(chosen.items()):
        views = [_cell(dataset, item, step, cell) for item, step in visits]
        columns = min(_MAX_COLUMNS, math.ceil(math.sqrt(len(views))))
        path = folder / f"{name}_dataset{index}_{bucket[0]}x{bucket[1]}.png"
        write_picture(contact_sheet(views, columns=columns, cell=cell), path)
        paths.append(path)
    return paths


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, complete or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG")
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; choose another folder or check its permissions"
        raise UserError(str(path), message=reason) from error


def _epoch(sets: Sequence[ImageSet], settings: ReadSettings, epoch: int) -> tuple[list[tuple[ItemAddress, ...]], int]:
    """Batches of an epoch, and the steps before it when every batch is a step."""
    batches = epoch_batches([images.ordered() for images in sets], settings.seed, epoch)
    return batches, (epoch - 1) * len(batches)


def debug_sheets(
    sets: Sequence[ImageSet], settings: ReadSettings, folder: Path, name: str, *, epoch: int = 1, limit: int = 64
) -> list[Path]:
    """Contact sheets of the first visits of each bucket, in the order in which an epoch trains on them.

    Caption warm-up is shown as of one process that takes an optimizer step per batch.

    Args:
        sets: the datasets that are trained on.
        settings: how they are read, with the seed of the run.
        folder: where `<name>_dataset<i>_<width>x<height>.png` goes.
        name: what file names begin with.
        epoch: from 1.
        limit: visits per bucket.

    Returns:
        The files written, by dataset and bucket.

    Raises:
        UserError: the folder cannot be written to.
    """
    batches, first_step = _epoch(sets, settings, epoch)
    return write_sheets(TrainDataset(sets, settings), batches, folder, name=name, first_step=first_step, limit=limit)


def debug_lines(sets: Sequence[ImageSet], settings: ReadSettings, *, epoch: int = 1, batches: int = 8) -> list[str]:
    """A line for each visit of the first batches of an epoch: image, sizes, crop, mirroring, text. Reads no image.

    Args:
        sets: the datasets that are trained on.
        settings: how they are read, with the seed of the run.
        epoch: from 1.
        batches: how many batches.
    """
    dataset = TrainDataset(sets, settings)
    order, first_step = _epoch(sets, settings, epoch)
    lines = []
    for number, batch in enumerate(order[:batches]):
        for item in batch:
            place, size = dataset.placement(item), dataset.record(item).size
            mirrored = ", flipped" if dataset.is_flipped(item) else ""
            text = dataset.caption(item, first_step + number)
            lines.append(
                f"batch {number}: {item.key}: {_by(size)} resized to {_by(place.resized)}, cut to {_by(place.bucket)} "
                f"at {place.crop[0]},{place.crop[1]}{mirrored}: {text!r}"
            )
    return lines


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def draw_buckets(sets: Sequence[ImageSet], path: Path) -> list[Path]:
    """A PNG with a bar per bucket, its height the visits per epoch; of many buckets the fullest.

    Args:
        sets: the datasets that are trained on.
        path: where it goes.

    Returns:
        The file written; none when there is no bucket to draw.

    Raises:
        UserError: it cannot be written.
    """
    counts = [
        (count, f"{number}: {_by(bucket)}" if len(sets) > 1 else _by(bucket))
        for number, images in enumerate(sets)
        for bucket, count in images.ordered().bucket_counts().items()
    ]
    if not counts:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = set(sorted(range(len(counts)), key=lambda n: -counts[n][0])[:_BUCKETS_SHOWN])
    bars = [bar for number, bar in enumerate(counts) if number in kept]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 2 + 0.3 * len(bars)), 4.5), dpi=110)
    axes.bar([label for _, label in bars], [count for count, _ in bars], color="#1f5f99")
    axes.tick_params(axis="x", labelrotation=90)
    more = f", the fullest {len(bars)} of {len(counts)}" if len(counts) > len(bars) else ""
    axes.set(ylabel="visits per epoch", title=f"buckets{more}")
    figure.tight_layout()
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    pyplot.close(figure)
    write_picture(picture, path)
    return [path]
