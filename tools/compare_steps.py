"""Compare two records of training steps: losses, gradients of noise levels, latents, step by step.

    python tools/compare_steps.py A B [--plot differences.png]

A and B are folders written with --record_steps (or recorded runs in the same layout).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.errors import UserError
from library.base.safetensors_io import atomic_path, load_file
from library.training.replay import read_lines

TENSORS = ("latents", "noise", "noisy", "timesteps")


def compare(first: Path, second: Path) -> list[dict[str, float]]:
    """One row per step that both records have.

    Returns:
        rows with `step`, both losses, their relative difference, and the largest absolute difference of each tensor.

    Raises:
        UserError: a folder is no record, or the two have no step in common.
    """
    left = {line["step"]: line for line in read_lines(first)}
    right = {line["step"]: line for line in read_lines(second)}
    steps = sorted(set(left) & set(right))
    if not steps:
        raise UserError(str(second), message=f"has no step in common with {first}")
    rows = []
    for step in steps:
        a, b = left[step]["loss"], right[step]["loss"]
        row = {"step": step, "loss_a": a, "loss_b": b, "relative": abs(a - b) / max(abs(a), 1e-12)}
        name = f"step_{step:06d}.safetensors"
        tensors_a, tensors_b = load_file(first / name), load_file(second / name)
        for key in TENSORS:
            if key in tensors_a and key in tensors_b:
                same = tensors_a[key].shape == tensors_b[key].shape
                row[key] = float((tensors_a[key] - tensors_b[key]).abs().max()) if same else float("inf")
        rows.append(row)
    return rows


def format_rows(rows: Sequence[dict[str, float]]) -> str:
    """The rows as a text table."""
    keys = [key for key in TENSORS if any(key in row for row in rows)]
    lines = ["  step        loss A        loss B  relative" + "".join(f"{key:>12}" for key in keys)]
    for row in rows:
        text = f"{row['step']:>6}  {row['loss_a']:>12.7f}  {row['loss_b']:>12.7f}  {row['relative']:>8.1e}"
        lines.append(text + "".join(f"{row.get(key, float('nan')):>12.1e}" for key in keys))
    worst = max(rows, key=lambda row: row["relative"])
    lines.append(f"largest relative difference of a loss: {worst['relative']:.2e} at step {worst['step']}")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Both loss curves, and their relative difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6))
    above.plot(steps, [row["loss_a"] for row in rows], label="A")
    above.plot(steps, [row["loss_b"] for row in rows], "--", label="B")
    above.set_ylabel("loss")
    above.legend()
    below.semilogy(steps, [max(row["relative"], 1e-12) for row in rows])
    below.set(xlabel="micro-step", ylabel="relative difference")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)


def setup_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = argparse.ArgumentParser(description="Compare two records of training steps.")
    parser.add_argument("a", type=Path, help="folder of the first record")
    parser.add_argument("b", type=Path, help="folder of the second record")
    parser.add_argument("--plot", type=Path, help="also draw the difference into this PNG file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = setup_parser().parse_args(argv)
    try:
        rows = compare(arguments.a, arguments.b)
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(format_rows(rows) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
        sys.stdout.write(f"plot: {arguments.plot}\n")


if __name__ == "__main__":
    main()
