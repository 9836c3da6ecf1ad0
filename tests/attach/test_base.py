from __future__ import annotations

import json
from pathlib import Path

import pytest

from horcrux_nbd.attach.base import RECORD, Attachment
from horcrux_nbd.attach.processes import Process
from horcrux_nbd.errors import Damaged


def make(state: Path) -> Attachment:
    return Attachment(
        via="fuse",
        device="/dev/loop5",
        socket="/run/horcrux/v/nbd.sock",
        state=str(state),
        name="v",
        size=1 << 60,
        processes=(Process(17, 4711),),
        server=99,
    )


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    attachment = make(tmp_path)
    attachment.save()
    assert (tmp_path / RECORD).stat().st_mode & 0o777 == 0o600
    loaded = Attachment.load(tmp_path)
    assert loaded == attachment
    assert loaded is not None
    assert loaded.server == 99
    assert json.loads(json.dumps(attachment.to_json()))["processes"] == [{"pid": 17, "start": 4711}]


def test_no_record_is_none_and_a_bad_one_is_damaged(tmp_path: Path) -> None:
    assert Attachment.load(tmp_path) is None
    for text in (
        "",
        "{",
        "[]",
        "{}",
        '{"processes": [], "more": 1}',
        '{"processes": [{"pid": 1}]}',
    ):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(Damaged, match=r"attachment\.json"):
            Attachment.load(tmp_path)
