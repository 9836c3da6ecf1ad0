"""A repository with two versions of one image, made once by the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support import make_directory, run


@pytest.fixture(scope="session")
def made_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    source = make_directory(folder / "source")
    words = ["-q", "--size", "64M", "AMCC", source, folder / "repository"]
    run("generate", "-s", "64K", "-m", "first", *words)
    (source / "small").write_text("hello again\n")
    run("generate", "-m", "second", *words)
    return folder / "repository"


@pytest.fixture
def repository(made_repository: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(made_repository, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def volume(made_repository: Path) -> Iterator[str]:
    """A volume `amcc` of it, taken down whatever the test did."""
    run("create", "amcc", made_repository, "AMCC")
    yield "amcc"
    run("umount", "--force", "amcc", ok=False)
    run("detach", "--force", "amcc", ok=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs: run as root (sudo)")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    subprocess.run(command, check=True, timeout=30)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)
