"""What noise levels a run would draw, and how much each would count: as text and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from library.base.safetensors_io import atomic_path
from library.diffusion.noise import LevelDraw
from library.diffusion.process import NoiseProcess

NUM_BINS = 20
_WIDTH = 50  # characters of the longest bar


@dataclass(frozen=True)
class LevelPreview:
    """A histogram over noise levels.

    Attributes:
        shares: of the draws in each of equally wide bins from 0 to 1000; they add up to 1.
        weights: mean loss weight of the draws in each bin; None where a bin has no draw.
        count: how many levels were drawn.
    """

    shares: Sequence[float]
    weights: Sequence[float | None]
    count: int

    @property
    def edges(self) -> list[int]:
        """Lower edge of each bin, 0..1000 units, and the upper edge of the last."""
        return [round(1000 * n / len(self.shares)) for n in range(len(self.shares) + 1)]


def preview_levels(
    process: NoiseProcess, latent_size: tuple[int, int], *, offset: float = 0.0, count: int = 10_000, seed: int = 0
) -> LevelPreview:
    """Draw noise levels as training does.

    Args:
        process: of the run.
        latent_size: (height, width) of the latents, on which some distributions depend.
        offset: shift of the distribution, in logits.
        count: how many levels.
        seed: of the draws.
    """
    draws = [LevelDraw(torch.Generator().manual_seed(seed))] * count  # one source for all: only their sum matters
    timesteps, sigmas = process.sample(draws, latent_size, [offset] * count)
    weights = process.weight(timesteps, sigmas)
    weights = torch.ones(count) if weights is None else weights
    bins = (timesteps / 1000 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)
    sums = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, bins, weights.double())
    means = [float(total / number) if number else None for total, number in zip(sums, counts)]
    return LevelPreview([float(number) / count for number in counts], means, count)


def preview_lines(preview: LevelPreview) -> list[str]:
    """One line per bin: its levels, a bar, its share and the mean weight of the loss."""
    largest = max(preview.shares)
    lines = [f"{'noise level':>11}  share of {preview.count} draws, mean loss weight"]
    for low, high, share, weight in zip(preview.edges, preview.edges[1:], preview.shares, preview.weights):
        bar = "#" * round(_WIDTH * share / largest)
        counted = "-" if weight is None else f"{weight:.3g}"
        lines.append(f"{low:>4} - {high:>4}  {bar:<{_WIDTH}} {share:6.1%}  {counted}")
    return lines


def plot_preview(path: Path, preview: LevelPreview, title: str) -> None:
    """Write the histogram and the weights as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    edges = preview.edges
    width = edges[1] - edges[0]
    axes.bar(edges[:-1], preview.shares, width=width, align="edge", alpha=0.7, label="share of draws")
    axes.set_xlabel("noise level (0: image, 1000: noise)")
    axes.set_ylabel("share of draws")
    axes.set_title(title)
    known = [(low + width / 2, weight) for low, weight in zip(edges, preview.weights) if weight is not None]
    right = axes.twinx()
    right.plot(*zip(*known), color="tab:red", marker="o", label="mean loss weight")
    right.set_ylabel("mean loss weight")
    right.set_ylim(bottom=0)
    figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.88))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)
