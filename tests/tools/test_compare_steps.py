"""The tool that compares records."""

import subprocess
import sys
from pathlib import Path

from support.runs import dataset_toml, network_arguments, run_training

TOOL = [sys.executable, str(Path(__file__).resolve().parents[2] / "tools" / "compare_steps.py")]


def compare(*arguments):
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_compare_steps(inputs, tmp_path):
    """Two records of the same run, and one of another seed."""
    for name, seed in (("a", "42"), ("b", "42"), ("c", "43")):
        arguments = network_arguments("sd", inputs, tmp_path, dataset_toml(tmp_path, inputs))
        arguments[arguments.index("--seed") + 1] = seed
        arguments[arguments.index("--max_train_steps") + 1] = "2"
        run_training("sd", [*arguments, "--record_steps", str(tmp_path / name)])
    plot = tmp_path / "plot.png"
    same = compare(tmp_path / "a", tmp_path / "b", "--plot", plot)
    assert same.returncode == 0 and plot.is_file()
    assert "largest relative difference of a loss: 0.00e+00" in same.stdout
    other = compare(tmp_path / "a", tmp_path / "c")
    assert other.returncode == 0 and "0.00e+00" not in other.stdout.splitlines()[-1]
    nothing = compare(tmp_path / "a", tmp_path)
    assert nothing.returncode != 0 and "holds no record" in nothing.stderr
