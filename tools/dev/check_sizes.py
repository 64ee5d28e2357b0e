"""Quality gates of the code base: sizes, documentation, annotations, duplication, the lists of the layer contracts.

    python tools/dev/check_sizes.py

Prints what was measured beside its limit; exit code 1 with every offender when a limit is broken.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("library", "networks", "tools")
MAX_FILE, MAX_SCRIPT, MAX_FUNCTION, MAX_PARAMETERS = 700, 60, 80, 8
MAX_DUPLICATED = 0.05
WINDOW = 8
NO_SCRIPTS = {"quickstart.py"}  # a program of its own, not the wiring of a family

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Gate:
    """One measure with its limit and whoever breaks it."""

    name: str
    measured: str
    limit: str
    offenders: tuple[str, ...]


def python_files(root: Path) -> list[Path]:
    """Files that git tracks or would add; without a repository, all but those in folders that hold no source."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return sorted(path for name in listed.stdout.splitlines() if (path := root / name).is_file())
    hidden = (".", "quickstart_output", "build")
    return sorted(path for path in root.rglob("*.py") if not path.relative_to(root).parts[0].startswith(hidden))


def functions(tree: ast.Module) -> Iterator[tuple[Function, bool]]:
    """Every function with whether it is public: neither it nor what holds it begins with an underscore."""

    def walk(node: ast.AST, public: bool, inside: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                visible = public and not inside and not child.name.startswith("_")
                yield child, visible
                yield from walk(child, public, True)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"), inside)
            else:
                yield from walk(child, public, inside)

    yield from walk(tree, True, False)


def parameters(function: Function) -> list[ast.arg]:
    """Parameters but for self and cls."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    named += [extra for extra in (given.vararg, given.kwarg) if extra]
    return [parameter for parameter in named if parameter.arg not in ("self", "cls")]


def normalised_lines(text: str) -> list[tuple[int, str]]:
    """(line number, text without space) of lines that count: no blanks, comments, imports, lone brackets."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"\s+", "", line)
        if bare and not bare.startswith("#") and not re.match(r"\s*(import|from)\b", line) and re.search(r"\w", bare):
            lines.append((number, bare))
    return lines


def duplicated_share(files: Sequence[Path], root: Path) -> tuple[float, list[str]]:
    """Share of lines inside a window of eight that stands elsewhere too, and where the windows are."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    lines = {path: normalised_lines(path.read_text(encoding="utf-8")) for path in files}
    for path, counted in lines.items():
        for start in range(len(counted) - WINDOW + 1):
            places[tuple(text for _, text in counted[start : start + WINDOW])].append((path, start))
    marked: dict[Path, set[int]] = defaultdict(set)
    shown = []
    for found in places.values():
        if len(found) > 1:
            shown.append(" = ".join(f"{path.relative_to(root)}:{lines[path][start][0]}" for path, start in found[:3]))
            for path, start in found:
                marked[path].update(range(start, start + WINDOW))
    total = sum(map(len, lines.values()))
    return sum(map(len, marked.values())) / max(1, total), shown


def unlisted_families(root: Path) -> list[str]:
    """Families that a contract of .importlinter should name and does not."""
    names = re.findall(r'"(\w+)": "library', (root / "library" / "families.py").read_text(encoding="utf-8"))
    contracts = (root / ".importlinter").read_text(encoding="utf-8").split("[importlinter:contract:")
    missing = []
    for contract in contracts:
        title = contract.split("]")[0]
        if title in ("layers", "light", "blind"):
            missing += [f"{title}: {name}_train_utils" for name in names if f"{name}_train_utils" not in contract]
    return missing


def measure(root: Path) -> list[Gate]:
    """All gates of a code base."""
    files = [path for path in python_files(root) if "tests" not in path.relative_to(root).parts]
    packages = [path for path in files if path.relative_to(root).parts[0] in PACKAGES]
    scripts = [path for path in files if path.parent == root and path.name not in NO_SCRIPTS]
    length = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long, many, bare, untyped = [], [], [], []
    longest = most = public = typed = total = 0
    for path in files:
        for function, visible in functions(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(root)}:{function.lineno} {function.name}"
            size, given = function.end_lineno - function.lineno + 1, parameters(function)
            longest, most = max(longest, size), max(most, len(given))
            long += [f"{where}: {size} lines"] if size > MAX_FUNCTION else []
            many += [f"{where}: {len(given)} parameters"] if len(given) > MAX_PARAMETERS else []
            if path not in packages:
                continue
            public += visible
            bare += [where] if visible and not ast.get_docstring(function) else []
            total += len(given)
            untyped += [f"{where}: {parameter.arg}" for parameter in given if parameter.annotation is None]
    typed = total - len(untyped)
    share, windows = duplicated_share(packages, root)
    unlisted = unlisted_families(root)

    def over(paths: Sequence[Path], limit: int) -> tuple[str, ...]:
        return tuple(f"{path.relative_to(root)}: {length[path]} lines" for path in paths if length[path] > limit)

    def largest(paths: Sequence[Path]) -> str:
        return str(max((length[path] for path in paths), default=0))

    return [
        Gate("longest file", largest(files), str(MAX_FILE), over(files, MAX_FILE)),
        Gate("longest script", largest(scripts), str(MAX_SCRIPT), over(scripts, MAX_SCRIPT)),
        Gate("longest function", str(longest), str(MAX_FUNCTION), tuple(long)),
        Gate("most parameters", str(most), str(MAX_PARAMETERS), tuple(many)),
        Gate("public functions documented", f"{public - len(bare)} of {public}", "all", tuple(bare)),
        Gate("parameters annotated", f"{typed} of {total}", "all", tuple(untyped)),
        Gate(
            "duplicated lines",
            f"{share:.1%}",
            f"{MAX_DUPLICATED:.0%}",
            tuple(windows) if share > MAX_DUPLICATED else (),
        ),
        Gate("families in the contracts", "all" if not unlisted else "some", "all", tuple(unlisted)),
    ]


def main(root: Path = ROOT) -> int:
    """Print the gates; returns 1 when one is broken."""
    gates = measure(root)
    for gate in gates:
        state = "ok" if not gate.offenders else "BROKEN"
        sys.stdout.write(f"{gate.name:<28} {gate.measured:>14}   limit {gate.limit:<5} {state}\n")
    broken = [gate for gate in gates if gate.offenders]
    for gate in broken:
        sys.stdout.write(f"\n{gate.name}:\n" + "".join(f"  {offender}\n" for offender in gate.offenders[:40]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
