"""Write or check docs/options.md, the list of every option.

Usage: python tools/dev/options_page.py [--check]
"""

import argparse
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "options.md"
if str(ROOT) not in sys.path:  # started as a file
    sys.path.insert(0, str(ROOT))

from library.families import FAMILIES  # noqa: E402
from library.options.conditions import CONDITIONS  # noqa: E402
from library.options.conflicts import CONFLICTS  # noqa: E402
from library.options.pending import NO_EFFECT, PENDING_FLAGS  # noqa: E402
from library.options.schedule import READS, SCHEDULE_FLAGS  # noqa: E402
from library.train_util import load_family, make_parser  # noqa: E402
from tools.dev.freeze_flags import load_script, script_paths  # noqa: E402

_INTRO = """# Options

Every option of every training script, by topic; made by `tools/dev/options_page.py` from the options themselves. A
`--config_file` takes the same names without dashes. Values that contradict each other stop a script before it loads
anything; an option without effect is named in a warning.

| word in the last column | scripts |
|---|---|
"""


def scripts_by_option() -> tuple[dict[str, list[str]], dict[type, None]]:
    """Option name -> scripts that offer it; all option groups in help order."""
    offered: dict[str, list[str]] = {}
    groups: dict[type, None] = {}
    for path in script_paths():
        script = load_script(path)
        if not hasattr(script, "FAMILY"):
            continue
        preset = getattr(script, "PRESET", None)
        family = load_family(script.FAMILY)
        groups.update(dict.fromkeys(family.command_line(script.TASK, preset).groups))
        for action in make_parser(script.FAMILY, script.TASK, preset)._actions:
            if action.dest != "help":
                offered.setdefault(action.dest, []).append(path.stem)
    return offered, groups


def scripts_text(names: list[str], every: int, sets: dict[frozenset[str], str]) -> str:
    """All scripts, a named set of them, or their names."""
    if len(set(names)) == every:
        return "all"
    key = frozenset(names)
    return sets.setdefault(key, f"set {len(sets) + 1}") if len(key) > 3 else ", ".join(sorted(key))


def notes(name: str) -> str:
    """What the option needs or excludes, where it does nothing, what is not there yet."""
    found = [text for option, _, text in CONFLICTS if option == name]
    if name in CONDITIONS:
        found.append(f"without effect otherwise: {CONDITIONS[name][1]}")
    if name in SCHEDULE_FLAGS:
        found.append("read by " + ", ".join(f"`{schedule}`" for schedule, flags in READS.items() if name in flags))
    silent: dict[str, list[str]] = {}
    for family in FAMILIES:
        if name in NO_EFFECT.get(family, {}):
            silent.setdefault(NO_EFFECT[family][name], []).append(load_family(family).title)
    found += [f"no effect for {', '.join(titles)}: {reason}" for reason, titles in silent.items()]
    if name in NO_EFFECT["*"]:
        found.append(f"no effect: {NO_EFFECT['*'][name]}")
    if name in PENDING_FLAGS:
        found.append("not available yet")
    return "; ".join(dict.fromkeys(found))


def default_text(item: Field) -> str:
    """The default as it is typed; nothing where there is none."""
    value = item.default
    if value is MISSING:
        return "required"
    if isinstance(value, bool):
        return "off" if not value else "on"
    return "" if value is None or value == "" else f"`{value}`"


def page() -> str:
    """The whole text."""
    offered, groups = scripts_by_option()
    every = len({name for names in offered.values() for name in names})
    sets: dict[frozenset[str], str] = {}
    sections = []
    for group in groups:
        rows = []
        for item in fields(group):
            meta = item.metadata.get("option")
            if meta is None or item.name not in offered:
                continue
            meaning = meta["help"].replace("|", "\\|").replace("%%", "%")
            if meta["choices"]:
                meaning += ": " + ", ".join(f"`{choice}`" for choice in meta["choices"])
            if meta["deprecated"]:
                meaning += f" (old; {meta['deprecated']})"
            where = scripts_text(offered[item.name], every, sets)
            cells = f"`--{item.name}`", default_text(item), meaning, notes(item.name).replace("|", "\\|"), where
            rows.append("| " + " | ".join(cells) + " |\n")
        if rows:
            title = (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
            head = "| option | default | meaning | needs, excludes | scripts |\n|---|---|---|---|---|\n"
            sections.append(f"\n## {title}\n\n{head}" + "".join(rows))
    legend = "| all | every training script |\n"
    for members, word in sets.items():
        left_out = {name for names in offered.values() for name in names} - members
        few = f"all but {', '.join(sorted(left_out))}" if len(left_out) < len(members) else ", ".join(sorted(members))
        legend += f"| {word} | {few} |\n"
    return _INTRO + legend + "".join(sections)


def main() -> int:
    """Write the page, or say that it is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the page is out of step")
    if parser.parse_args().check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
            return 0
        print("docs/options.md is out of step; run: python tools/dev/options_page.py")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
