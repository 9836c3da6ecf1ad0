"""A tree with every kind of entry, made once, and its image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horcrux_nbd.source import open_source

from .trees import make_tree, write_image

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting needs root: run the tests as root in a virtual machine"
)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by tests."""
    root = tmp_path_factory.mktemp("source") / "tree"
    make_tree(root)
    return root


@pytest.fixture(scope="session")
def image(tree: Path) -> Path:
    """The tree as an ext4 image."""
    path = tree.parent / "image"
    with open_source(tree, label="AMCC") as source:
        write_image(source, path)
        assert source.problems() == []
    return path
