"""Tables that line up, times that people read, text that cannot command a terminal."""

from __future__ import annotations

import pytest

from horcrux_nbd.cli import output


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("NAME", "SIZE"), [("a", "1 B"), ("long name", "10.0 KiB")], right=("SIZE",))
    assert capsys.readouterr().out.splitlines() == [
        "NAME           SIZE",
        "a               1 B",
        "long name  10.0 KiB",
    ]


def test_table_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last column gives way, and only that."""
    monkeypatch.setattr(output.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    output.table(("ID", "MESSAGE"), [("0123456789ab", "m" * 100)])
    row = capsys.readouterr().out.splitlines()[1]
    assert len(row) == 40
    assert row.endswith("m…")
    monkeypatch.setenv("COLUMNS", "15")
    output.table(("ID", "MESSAGE"), [("0123456789ab", "m" * 100)])
    assert "m" * 100 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("two\nlines\t", "two lines"),
        ("\x1b[31mred\x07", "�[31mred�"),
        ("\u202eesrever", "�esrever"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert output.printable(text) == shown


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(output.when("2026-11-21T11:38:20.177975Z")) == len("2026-11-21 11:38")
    assert output.when("no\x1btime") == "no�time"


def test_words() -> None:
    assert output.plural(1, "object") == "1 object"
    assert output.plural(1234, "object") == "1,234 objects"
    assert output.short(bytes(range(32))) == output.short(bytes(range(32)).hex()) == "000102030405"
    assert output.who("Ada <ada@example.org>") == "Ada"
    assert output.who("<ada@example.org>") == "<ada@example.org>"
