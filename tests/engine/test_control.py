"""Orders in the control file: each is read once, however its writer goes about it."""

import pytest

from library.training import control
from library.training.control import Control, Orders


@pytest.fixture
def orders(tmp_path):
    return Control(tmp_path / "last.control", interactive=False, is_main=True, status=lambda: "")


def heard(orders) -> Orders:
    orders.poll(1)
    return Control.understood(orders.outgoing())


def test_a_line_is_heard_once(orders):
    orders.file.write_text("save\n")
    assert heard(orders).verbs == {"save"}
    assert heard(orders).verbs == frozenset()


def test_a_writer_that_opened_the_file_before_it_was_read_is_heard(orders):
    """A shell opens the file first and writes afterwards; a boundary may lie between."""
    with open(orders.file, "a") as file:
        assert heard(orders).verbs == frozenset()
        assert not orders.file.exists()
        file.write("sa")
        file.flush()
        assert heard(orders).verbs == frozenset()  # half a line is no order
        file.write("ve_state\n")
        file.flush()
        assert heard(orders).verbs == {"save_state"}
    orders.file.write_text("sample\n")
    assert heard(orders).verbs == {"sample"}


def test_a_last_line_without_an_end_is_heard_when_nothing_follows(orders, monkeypatch):
    orders.file.write_text("quit")
    assert heard(orders).verbs == frozenset()
    later = control.time.monotonic() + 10
    monkeypatch.setattr(control.time, "monotonic", lambda: later)
    assert heard(orders).verbs == {"quit"}
    assert list(orders.file.parent.iterdir()) == []


def test_nothing_is_left_behind(orders):
    orders.file.write_text("quit\n")
    with orders.listening():
        orders.file.write_text("save\n")
        heard(orders)
    assert list(orders.file.parent.iterdir()) == []
