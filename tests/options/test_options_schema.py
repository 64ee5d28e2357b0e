"""Option groups, precedence, configuration files."""

import logging
import tomllib
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from library.base.errors import Problem, UserError
from library.options.config import ConfigOptions
from library.options.schema import REQUIRED, OptionSet, build_parser, from_values, option, parse, write_config
from library.options.values import int_or_float


@dataclass(frozen=True, kw_only=True)
class Basic:
    """Basic: for the tests."""

    size: int = option(1, help="size")
    rate: float = option(0.5, help="rate")
    name: str | None = option(None, help="name", aliases=("nmae",))
    fast: bool = option(False, help="fast")
    kind: str = option("a", help="kind", choices=("a", "b", "abc"))
    warmup: int | float = option(0, help="warm-up")
    rates: list[float] | None = option(None, help="rates")
    network_args: list[str] | None = option(None, help="arguments")
    folder: Path | None = option(None, help="folder")
    huggingface_token: str | None = option(None, help="token")

    def problems(self) -> Iterator[Problem]:
        if self.size < 0:
            yield Problem("--size", "must not be negative", self.size)


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Needed."""

    must: str = option(REQUIRED, help="must be there")


@dataclass(frozen=True, kw_only=True)
class Old:
    """Old."""

    ancient: bool = option(False, help="old", deprecated="--modern")


GROUPS = (ConfigOptions, Basic)


@pytest.fixture(autouse=True)
def caught_warnings(caplog):
    """The logger as it is before a script configures it."""
    logger = logging.getLogger("diffusion_scripts")
    before = logger.propagate, logger.handlers[:]
    logger.propagate, logger.handlers[:] = True, []
    yield
    logger.propagate, logger.handlers[:] = before


def _parse(*argv, groups=GROUPS, **changes):
    return parse(groups, list(argv), prog="x.py", **changes)


def _config(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def _problems(call):
    with pytest.raises(UserError) as caught:
        call()
    return [str(problem) for problem in caught.value.problems]


def test_defaults_file_and_command_line(tmp_path):
    config = _config(tmp_path, 'size = 5\n[some_section]\nrate = 2\nname = "n"\n[other]\nfast = true\n')
    options = _parse("--config_file", config, "--size", "7")
    basic = options[Basic]
    assert (basic.size, basic.rate, basic.name, basic.fast, basic.kind) == (7, 2.0, "n", True, "a")
    assert isinstance(basic.rate, float)
    origins = {name: options.origin(name) for name in ("size", "rate", "fast", "kind", "config_file")}
    assert origins == {"size": "cli", "rate": "file", "fast": "file", "kind": "default", "config_file": "cli"}


def test_a_value_equal_to_the_default_was_still_given():
    assert _parse("--size", "1").origin("size") == "cli"
    assert _parse().origin("size") == "default"


def test_toml_suffix_and_byte_order_mark(tmp_path):
    _config(tmp_path, "\ufeffsize = 3\n")
    assert _parse("--config_file", str(tmp_path / "run"))[Basic].size == 3


def test_later_sections_win(tmp_path):
    assert _parse("--config_file", _config(tmp_path, "[a]\nsize = 2\n[b]\nsize = 3\n"))[Basic].size == 3


def test_abbreviations_work():
    assert _parse("--warm", "3")[Basic].warmup == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('size = "3"', "size = '3': expected a whole number; write 3 without quotes"),
        ("size = 3.0", "size = 3.0: expected a whole number; write 3"),
        ("size = true", "size = True: expected a whole number"),
        ('rate = "1e-4"', "rate = '1e-4': expected a number; write 1e-4 without quotes"),
        ("rate = false", "rate = False: expected a number"),
        ("name = 3", 'name = 3: expected a text in quotes; write "3"'),
        ("fast = 1", "fast = 1: expected true or false"),
        ('fast = "true"', "fast = 'true': expected true or false; write true without quotes"),
        ('kind = "ab"', "kind = 'ab': expected one of a, b, abc; did you mean 'abc'?"),
        ("warmup = 100.0", "warmup = 100.0: expected a whole number, or a fraction below 1; write 100"),
        ('rates = ["x"]', "rates = ['x']: expected a list, each item a number"),
        ("[t.size]\nx = 1", "size = {'x': 1}: expected a whole number"),
    ],
)
def test_wrong_types_name_file_key_value_and_fix(tmp_path, line, expected):
    config = _config(tmp_path, line + "\n")
    assert _problems(lambda: _parse("--config_file", config)) == [f"{config}: {expected}"]


def test_right_types(tmp_path):
    config = _config(
        tmp_path, 'rate = 1\nwarmup = 100\nrates = 0.5\nnetwork_args = ["a=1"]\nfolder = "x/y"\nkind = "b"\n'
    )
    basic = _parse("--config_file", config)[Basic]
    assert (basic.rate, basic.warmup, basic.rates, basic.network_args) == (1.0, 100, [0.5], ["a=1"])
    assert basic.folder == Path("x/y")
    assert _parse("--config_file", _config(tmp_path, "warmup = 0.1\nrates = [1, 2]\n"))[Basic].rates == [1.0, 2.0]
    assert _parse("--config_file", _config(tmp_path, 'warmup = "10%"\n'))[Basic].warmup == 0.1


def test_an_alias_works_everywhere(tmp_path):
    assert _parse("--nmae", "x")[Basic].name == "x"
    config = _config(tmp_path, 'nmae = "old"\nname = "new"\n')
    options = _parse("--config_file", config)
    assert options[Basic].name == "old"
    assert options.namespace().nmae == "old" == options.namespace().name


def test_all_problems_come_together(tmp_path):
    config = _config(tmp_path, 'size = "x"\nrate = true\n')
    found = _problems(lambda: _parse("--config_file", config, "--sise", "3", groups=(*GROUPS, Needed)))
    assert found == [
        "--sise: unknown flag; did you mean --size?",
        f"{config}: size = 'x': expected a whole number",
        f"{config}: rate = True: expected a number",
        "--must: is required: must be there",
    ]


def test_unknown_keys_warn_once_and_strict_stops(tmp_path, caplog):
    config = _config(tmp_path, "sise = 3\nqqqqq = 1\n")
    assert _parse("--config_file", config)[Basic].size == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{config}: ignored, not options of this script: sise (did you mean 'size'?), qqqqq"
    ]
    expected = [
        f"{config}: sise: is not an option of this script (did you mean 'size'?)",
        f"{config}: qqqqq: is not an option of this script",
    ]
    assert _problems(lambda: _parse("--config_file", config, "--strict_config")) == expected
    config = _config(tmp_path, "strict_config = true\nsise = 3\nqqqqq = 1\n")
    assert _problems(lambda: _parse("--config_file", config)) == expected


def test_lora_plus_keys_become_network_arguments(tmp_path, caplog):
    text = 'loraplus_lr_ratio = 4\nloraplus_unet_lr_ratio = 0\nnetwork_args = ["a=1"]\n'
    config = _config(tmp_path, text)
    assert _parse("--config_file", config)[Basic].network_args == ["a=1", "loraplus_lr_ratio=4"]
    assert "--network_args: loraplus_lr_ratio=4" in caplog.text
    options = _parse("--config_file", config, "--network_args", "loraplus_lr_ratio=9")
    assert options[Basic].network_args == ["loraplus_lr_ratio=9"]
    config = _config(tmp_path, 'loraplus_lr_ratio = "4"\n')
    assert _problems(lambda: _parse("--config_file", config)) == [
        f"{config}: loraplus_lr_ratio = '4': expected a number"
    ]


def test_dead_and_command_line_only_keys_warn(tmp_path, caplog):
    config = _config(tmp_path, 'lowvram = true\nconfig_file = "y.toml"\n')
    assert _parse("--config_file", config)[ConfigOptions].config_file == config
    assert "lowvram has no effect" in caplog.text and "config_file is read from the command line only" in caplog.text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("size = \n", "is not valid TOML"),
        ('name = "C:\\images"\n', "forward slashes"),
        ('name = "C:\\Users"', "slashes"),
    ],
)
def test_broken_files(tmp_path, content, part):
    config = _config(tmp_path, content)
    (found,) = _problems(lambda: _parse("--config_file", config))
    assert part in found and config in found


def test_missing_and_undecodable_files(tmp_path):
    assert "cannot be read" in _problems(lambda: _parse("--config_file", str(tmp_path / "no.toml")))[0]
    (tmp_path / "bad.toml").write_bytes(b'name = "\xff\xfe"')
    assert "is not UTF-8" in _problems(lambda: _parse("--config_file", str(tmp_path / "bad.toml")))[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--size", "x"], "--size: invalid int value: 'x'"),
        (["--sise=3"], "--sise: unknown flag; did you mean --size?"),
        (["stray"], "stray: unexpected argument; a value must follow its flag"),
        (["--warmup", "1.5"], "--warmup: invalid value: '1.5' (a whole number of steps, a fraction below 1, or"),
        (["--size"], "--size: expected one argument"),
        (["--rat", "1"], "command line: ambiguous option: --rat could match --rate, --rates"),
    ],
)
def test_mistakes_on_the_command_line(argv, expected):
    (found,) = _problems(lambda: _parse(*argv))
    assert found.startswith(expected)


def test_wrong_choice_names_the_nearest():
    (found,) = _problems(lambda: _parse("--kind", "ab"))
    assert found.startswith("--kind: invalid choice: 'ab'") and found.endswith("did you mean 'abc'?")


def test_parser_alone_exits_with_code_2(capsys):
    parser = build_parser(GROUPS, "x.py", "Test.")
    assert parser.parse_args([]).size == 1
    for argv, expected in ((["--sise", "3"], "--sise: unknown flag"), (["--size", "x"], "--size: invalid int")):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(argv)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.startswith(f"error: {expected}") and error.count("\n") == 1


def test_changed_defaults_choices_and_hidden_fields(tmp_path, caplog):
    changes = {"defaults": {"size": 8}, "choices": {"kind": ("x",)}, "hidden": frozenset({"rate", "rates"})}
    options = _parse(groups=GROUPS, **changes)
    assert (options[Basic].size, options[Basic].rate) == (8, 0.5) and "rate" not in options.offered
    assert _problems(lambda: _parse("--rate", "1", **changes))[0].startswith("--rate: unknown flag")
    assert _parse("--kind", "x", **changes)[Basic].kind == "x"
    assert _parse("--size", "8", **changes).changed() == {}
    assert _parse("--size", "1", **changes).changed() == {"size": 1}
    assert _parse("--config_file", _config(tmp_path, "rate = 1.0\n"), **changes)[Basic].rate == 0.5
    assert "rate" in caplog.text


def test_old_flags_warn(caplog):
    parse((ConfigOptions, Old), ["--ancient"])
    assert "--ancient is an old flag: --modern" in caplog.text


def test_from_values():
    options = from_values(GROUPS, {"size": 3, "rates": (1, 2), "folder": Path("p"), "name": None})
    assert (options[Basic].size, options[Basic].rates, options[Basic].folder) == (3, [1.0, 2.0], Path("p"))
    assert options.origin("size") == "api" and options.origin("rate") == "default"
    found = _problems(lambda: from_values((*GROUPS, Needed), {"sise": 1, "rate": "fast", "config_file": "x"}))
    assert found == [
        "sise: is not an option; did you mean 'size'?",
        "rate = 'fast': expected a number",
        "config_file: belongs to the command line",
        "--must: is required: must be there",
    ]


def test_option_set():
    options = _parse("--size", "3")
    assert Basic in options and Needed not in options and options.get(Needed) is None
    assert options.groups == GROUPS
    with pytest.raises(FrozenInstanceError):
        options[Basic].size = 4
    other = options.replace(Basic, size=-1, rate=1.0)
    assert (options[Basic].size, other[Basic].size, other.origin("rate")) == (3, -1, "api")
    assert [str(problem) for problem in other.problems()] == ["--size = -1: must not be negative"]
    assert list(options.problems()) == []
    namespace = options.namespace()
    assert namespace.size == 3 and namespace.strict_config is False
    extended = options.with_group(Old(ancient=True))
    assert isinstance(extended, OptionSet) and extended[Old].ancient and Old not in options
    with pytest.raises(KeyError):
        options[Old]


def test_one_name_in_two_groups_is_our_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Again:
        """Again."""

        size: int = option(1, help="size")

    with pytest.raises(AssertionError, match="size"):
        build_parser((Basic, Again))
    with pytest.raises(TypeError, match="colour"):
        option(1, help="x", colour="red")


def test_written_options_read_back_the_same(tmp_path):
    argv = ["--size", "4", "--rate", "1e-05", "--name", 'a "b" \\ \u00e9\n', "--fast", "--rates", "1", "2e-7"]
    argv += ["--warmup", "10%", "--folder", "p q", "--huggingface_token", "secret", "--network_args", "a=b,c", "d=e"]
    options = _parse(*argv)
    path = tmp_path / "out.toml"
    write_config(options, path)
    text = path.read_text(encoding="utf-8")
    assert "secret" not in text and "kind" not in text
    assert set(tomllib.loads(text)) == {"size", "rate", "name", "fast", "rates", "warmup", "folder", "network_args"}
    again = _parse("--config_file", str(path), "--huggingface_token", "secret")
    assert again[Basic] == options[Basic]
    assert "exists already" in _problems(lambda: write_config(options, path))[0]
    assert "cannot be written" in _problems(lambda: write_config(options, tmp_path / "no" / "x.toml"))[0]


def test_output_config_does_not_read_the_file(tmp_path):
    options = _parse("--config_file", str(tmp_path / "new.toml"), "--output_config", groups=(*GROUPS, Needed))
    assert options[ConfigOptions].output_config


@pytest.mark.parametrize(("text", "value"), [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("0", 0), ("1", 1)])
def test_int_or_float(text, value):
    assert int_or_float(text) == value and type(int_or_float(text)) is type(value)
