"""How long `--help` of every training script takes. Target: under 0.7 s.

python benchmarks/help_time.py
"""

import sys

from common import ROOT, median, seconds

TARGET = 0.7


def main() -> None:
    floor = median(lambda: seconds([sys.executable, "-c", "import argparse"]))
    print(f"{'python with argparse alone':<42} {floor:6.3f} s   (floor)")
    worst = 0.0
    for script in sorted(path for path in ROOT.glob("*.py") if "setup_parser" in path.read_text(encoding="utf-8")):
        taken = median(lambda script=script: seconds([sys.executable, script.name, "--help"]), runs=3)
        worst = max(worst, taken)
        print(f"{script.name:<42} {taken:6.3f} s   {taken / floor:4.1f} x floor")
    print(f"slowest {worst:.3f} s, target {TARGET} s: {'met' if worst < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
