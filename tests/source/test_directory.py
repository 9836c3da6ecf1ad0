"""A directory as ext4: the kernel must see in the image what it sees in the directory."""

from __future__ import annotations

from pathlib import Path

from horcrux_nbd.source import open_source

from .trees import describe, make_tree, mounted, write_image


def test_all(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    before = describe(tmp_path / "tree")
    with open_source(tmp_path / "tree", label="x") as source:
        write_image(source, tmp_path / "image")
        assert source.problems() == []
    with mounted(tmp_path / "image", tmp_path / "mnt", "ext4") as point:
        after = describe(point)
    assert list(before) == list(after)
    for path, entry in before.items():
        assert entry == after[path], path
