"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from library.base.safetensors_io import atomic_path


def smooth(values: Sequence[float], factor: float = 0.95) -> list[float]:
    """Exponential moving average without a bias towards its start."""
    result: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = factor * total + (1 - factor) * value, factor * weight + (1 - factor)
        result.append(total / weight)
    return result


def plot_losses(
    path: Path, steps: Sequence[int], losses: Sequence[float], validation: Sequence[tuple[int, float]], title: str
) -> None:
    """Write a PNG with the loss per step, its average, and the validation losses (step, loss)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=110)
    axes.plot(steps, losses, color="#9bbcd8", linewidth=0.8, label="loss")
    axes.plot(steps, smooth(losses), color="#1f5f99", linewidth=1.8, label="loss, smoothed")
    if validation:
        axes.plot(*zip(*validation), color="#c1440e", marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
