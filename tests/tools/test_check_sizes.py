"""The gates find what they are for."""

import pytest

from tools.dev import check_sizes


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "families.py").write_text('FAMILIES = {"nova": "library.nova_train_utils:FAMILY"}\n')
    contract = "[importlinter:contract:{}]\nnova_train_utils\n"
    (tmp_path / ".importlinter").write_text("".join(contract.format(name) for name in ("layers", "light", "blind")))
    return tmp_path


def broken(tree):
    return {gate.name: gate.offenders for gate in check_sizes.measure(tree) if gate.offenders}


def test_a_clean_tree_passes(tree):
    (tree / "library" / "a.py").write_text('"""A."""\n\n\ndef f(x: int) -> int:\n    """F."""\n    return x\n')
    assert broken(tree) == {}
    assert check_sizes.main(tree) == 0


def test_environments_are_not_measured(tree):
    (tree / ".venv" / "library").mkdir(parents=True)
    (tree / ".venv" / "library" / "a.py").write_text("x = 1\n" * 701)
    assert broken(tree) == {}


CODE = {
    "longest file": ("library/a.py", "x = 1\n" * 701),
    "longest script": ("train.py", "x = 1\n" * 61),
    "longest function": ("library/a.py", "def _f() -> None:\n" + "    x = 1\n" * 80),
    "most parameters": (
        "library/a.py",
        "def _f(" + ", ".join(f"a{n}: int" for n in range(9)) + ") -> None:\n    pass\n",
    ),
    "public functions documented": ("library/a.py", "class A:\n    def f(self) -> None:\n        pass\n"),
    "parameters annotated": ("library/a.py", "def _f(x) -> None:\n    pass\n"),
    "duplicated lines": ("library/a.py", "\n".join(f"value_{n} = {n}" for n in range(9)) + "\n"),
}


@pytest.mark.parametrize("gate", CODE)
def test_each_offence_is_found_alone(tree, gate):
    name, text = CODE[gate]
    (tree / name).write_text(text)
    if gate == "duplicated lines":
        (tree / "library" / "b.py").write_text(text)
    assert gate in broken(tree)
    assert check_sizes.main(tree) == 1


def test_private_and_inner_functions_need_no_text(tree):
    (tree / "library" / "a.py").write_text(
        '"""A."""\n\n\nclass _A:\n    def f(self) -> None:\n        pass\n\n\n'
        'def g() -> None:\n    """G."""\n\n    def inner() -> None:\n        pass\n'
    )
    assert broken(tree) == {}


@pytest.mark.parametrize("contract", ["layers", "light", "blind"])
def test_a_family_missing_in_a_contract(tree, contract):
    text = (tree / ".importlinter").read_text()
    (tree / ".importlinter").write_text(
        text.replace(f"contract:{contract}]\nnova_train_utils", f"contract:{contract}]\n")
    )
    assert broken(tree) == {"families in the contracts": (f"{contract}: nova_train_utils",)}


def test_this_code_base_passes():
    assert check_sizes.main() == 0
