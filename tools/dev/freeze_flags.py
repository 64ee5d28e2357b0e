"""Write or check the frozen list of flags of every script with a `setup_parser()`.

Usage: python tools/dev/freeze_flags.py [--check]
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FROZEN = ROOT / "tests" / "golden" / "flags"

if str(ROOT) not in sys.path:  # started as a file: the scripts import `library`
    sys.path.insert(0, str(ROOT))


def script_paths() -> list[Path]:
    """Every root script that offers a parser."""
    return sorted(path for path in ROOT.glob("*.py") if "setup_parser" in path.read_text(encoding="utf-8"))


def load_script(path: Path) -> object:
    """Import a script without running it."""
    spec = importlib.util.spec_from_file_location(f"frozen_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listing(parser: argparse.ArgumentParser) -> str:
    """One line per flag, sorted: spelling, type, default, choices, nargs."""
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        switch = isinstance(action, argparse._StoreTrueAction)
        kind = "switch" if switch else getattr(action.type, "__name__", "str")
        choices = ",".join(str(choice) for choice in action.choices) if action.choices else "-"
        nargs = "-" if switch or action.nargs is None else action.nargs
        names = "/".join(action.option_strings)
        lines.append(f"{names} type={kind} default={action.default!r} choices={choices} nargs={nargs}\n")
    return "".join(sorted(lines))


def differences() -> list[str]:
    """What the frozen lists and the scripts disagree on, one sentence each."""
    found = []
    paths = script_paths()
    for path in paths:
        frozen = FROZEN / f"{path.stem}.txt"
        before = frozen.read_text(encoding="utf-8").splitlines() if frozen.exists() else []
        now = listing(load_script(path).setup_parser()).splitlines()
        found += [f"{path.name}: gone: {line}" for line in before if line not in now]
        found += [f"{path.name}: new: {line}" for line in now if line not in before]
    known = {path.stem for path in paths}
    found += [f"{path.name}: its script is gone" for path in FROZEN.glob("*.txt") if path.stem not in known]
    return found


def main() -> int:
    """Freeze, or check and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 when something differs")
    if parser.parse_args().check:
        found = differences()
        sys.stderr.write("".join(f"{line}\n" for line in found))
        return 1 if found else 0
    FROZEN.mkdir(parents=True, exist_ok=True)
    for path in script_paths():
        text = listing(load_script(path).setup_parser())
        (FROZEN / f"{path.stem}.txt").write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
