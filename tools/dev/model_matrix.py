"""Write or check the table of model families and what can be done with them in README.md.

Usage: python tools/dev/model_matrix.py [--check]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- models: made by tools/dev/model_matrix.py -->", "<!-- end of models -->"
if str(ROOT) not in sys.path:  # started as a file
    sys.path.insert(0, str(ROOT))

from library.families import FAMILIES  # noqa: E402
from library.train_util import load_family  # noqa: E402
from tools.dev.freeze_flags import load_script, script_paths  # noqa: E402

_TASKS = {
    "network": "adapters",
    "full": "whole model",
    "control_net": "ControlNet",
    "lllite": "LLLite",
    "textual_inversion": "textual inversion",
    "leco": "LECO",
}


def _scripts() -> dict[tuple[str, str], list[str]]:
    """(family, task) -> names of its scripts; old names that forward to others are left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in script_paths():
        script = load_script(path)
        if hasattr(script, "FAMILY"):
            found.setdefault((script.FAMILY, script.TASK), []).append(path.name)
    return found


def table() -> str:
    """The table: a script's name where it works, `later` where there is one that says that it does not work yet."""
    scripts = _scripts()
    lines = ["| model | " + " | ".join(_TASKS.values()) + " | images without training |", "|---" * 8 + "|"]
    for name in FAMILIES:
        family = load_family(name)
        cells = []
        for task in _TASKS:
            if task in family.available_tasks:
                cells.append(", ".join(f"`{script}`" for script in scripts[name, task]))
            else:
                cells.append("later" if task in family.tasks else "")
        image = f"`{name}_minimal_inference.py`" if family.inference is not None else ""
        page = ROOT / "docs" / "families" / f"{name}.md"
        title = f"[{family.title}](docs/families/{name}.md)" if page.is_file() else family.title
        lines.append("| " + " | ".join([title, *cells, image]) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table of now.

    Raises:
        ValueError: the page has no place for it.
    """
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{table()}\n{text[end:]}"


def main() -> None:
    """Write the table, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the table is out of date")
    arguments = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if arguments.check and new != old:
        raise SystemExit("README.md: the table of models is out of date; run tools/dev/model_matrix.py")
    if not arguments.check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
