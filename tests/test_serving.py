from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd import control, serving
from horcrux_nbd.errors import Damaged, NoSpace, StoreRefused, StoreUnavailable, UsageError
from horcrux_nbd.serving import Server, errno_of, message_of

from .volume.support import CHUNK, IMAGE, make_image, noise, read


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_image(tmp_path / "repo", noise(3 * CHUNK))


def server(tmp_path: Path, url: str, **more: str) -> Server:
    made = Server()
    keys = {"repo": url, "name": IMAGE, "overlay": f"{tmp_path}/o", "cache": f"{tmp_path}/c"}
    for key, value in {**keys, **more}.items():
        made.configure(key, value)
    made.configured()
    return made


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, ""), errno.ENOSPC),
        (NoSpace(""), errno.ENOSPC),
        (OSError(errno.EDQUOT, ""), errno.ENOSPC),
        (OSError(errno.EIO, ""), errno.EIO),
        (OSError(errno.EMFILE, ""), errno.EIO),
        (Damaged(""), errno.EIO),
        (StoreUnavailable(""), errno.EIO),
        (StoreRefused(""), errno.EIO),
        (UsageError(""), errno.EINVAL),
        (MemoryError(), errno.ENOMEM),
        (KeyError("a bug"), errno.EIO),
    ],
)
def test_what_the_client_is_told(error: BaseException, expected: int) -> None:
    """What NBD has no number for would reach it as EINVAL, as if it had asked for nonsense."""
    assert errno_of(error) == expected


def test_messages_are_lines() -> None:
    assert message_of(Damaged("object x\nis damaged")) == "object x is damaged"
    assert message_of(FileNotFoundError(2, "No such file", "/a/b")) == "No such file: /a/b"
    assert message_of(OSError(5, "Input/output error")) == "Input/output error"


def test_nbdkit_is_given_one_line_for_an_error_and_everything_for_a_bug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traceback, "format_exception", traceback.format_exception)
    serving.tell_in_one_line()

    def told(error: Exception) -> str:
        try:
            raise error
        except Exception as caught:  # as nbdkit's plugins/python/errors.c calls it
            return "".join(traceback.format_exception(type(caught), caught, caught.__traceback__))

    assert told(Damaged("object x is damaged")) == "object x is damaged"
    assert told(OSError(5, "Input/output error", "/x")) == "Input/output error: /x"
    assert told(KeyError("a bug")).startswith("Traceback")


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbdkit goes to / when it forks into the background."""
    monkeypatch.chdir(tmp_path)
    url = make_image(tmp_path / "repo", noise(CHUNK))
    made = server(tmp_path, url, overlay="rel/o", cache="rel/c", control="rel.sock")
    made.prepare()
    monkeypatch.chdir("/")
    made.start()
    assert read(made.connect(""), 0, CHUNK) == noise(CHUNK)
    assert control.ask(tmp_path / "rel.sock", "figures")["fetched_chunks"] == 1
    made.stop()
    assert (tmp_path / "rel" / "o" / "volume.json").exists()
    assert not (tmp_path / "rel.sock").exists()
    made = Server()
    made.configure("volume", "rel/o")
    monkeypatch.chdir(tmp_path)
    made.configured()
    monkeypatch.chdir("/")
    made.prepare()
    made.stop()


def test_a_repository_is_the_same_however_it_is_written(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only another one has to be looked at, which it could not be now."""
    first = server(tmp_path, url)
    first.prepare()
    first.stop()
    os.rename(tmp_path / "repo", tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    for text in (url + "/", "./repo", f"{tmp_path}/repo"):
        again = server(tmp_path, text)
        again.prepare()
        again.stop()


def test_the_volume_is_open_and_locked_from_the_first_check_on(tmp_path: Path, url: str) -> None:
    first, second = server(tmp_path, url), server(tmp_path, url)
    first.prepare()
    with pytest.raises(serving.HorcruxError, match=f"in use by process {os.getpid()}"):
        second.prepare()
    first.start()
    assert first.export == IMAGE
    assert first.description == "o: a version"
    assert first.connect("") is first.connect(IMAGE)
    with pytest.raises(UsageError, match="there is no export 'X' here, only 'AMCC'"):
        first.connect("X")
    first.stop()
    first.stop()
    second.prepare()
    second.stop()


class Pieces:
    """A volume of small extents that counts how many are asked for."""

    def __init__(self) -> None:
        self.given = 0

    def extents(self, offset: int, count: int) -> Iterator[tuple[int, int, bool, bool]]:
        for at in range(offset, offset + count, 10):
            self.given += 1
            yield at, at + 10, bool(at // 10 % 2), not at // 10 % 2


def test_extents_are_told_as_nbd_has_them_and_not_too_many_at_once() -> None:
    pieces: Any = Pieces()
    assert serving.extents(pieces, 0, 30, one=False) == [(0, 10, 3), (10, 10, 0), (20, 10, 3)]
    assert serving.extents(pieces, 10, 1000, one=True) == [(10, 10, 0)]
    pieces.given = 0
    assert len(serving.extents(pieces, 0, 1 << 30, one=False)) == serving.MAX_EXTENTS
    assert pieces.given == serving.MAX_EXTENTS
