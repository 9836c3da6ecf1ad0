"""The commands about versions, as they are typed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.cli.main import main
from horcrux_nbd.generate import generate
from horcrux_nbd.source.raw import RawSource
from tests.versions.support import BLOCK, Disk, small_repository
from tests.volume.support import IMAGE, make_image, noise

needs_ext4 = pytest.mark.skipif(
    not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4: apt-get install e2fsprogs"
)


DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


class Command:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """Its standard output. Whatever else it says is one line."""
        self._capsys.readouterr()
        got = main(words)
        out, err = self._capsys.readouterr()
        assert got == code, err
        self.said = err
        if code:
            lines = [line for line in err.splitlines() if line.startswith("horcrux-cli: ")]
            assert len(lines) == 1, err
            assert "Traceback" not in err
            self.said = lines[0]
        return out

    def json(self, *words: str) -> Any:
        """What it says; every key of it is in docs/cli.md."""
        value = json.loads(self(*words, "--json"))
        rows = [*value] if isinstance(value, list) else [value]
        rows += [one for row in rows for one in row.values() if isinstance(one, dict)]
        keys = {key for row in rows for key in row} - {"v1", "ticket"}
        assert sorted(key for key in keys if f"`{key}`" not in DOCS) == []
        return value


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return small_repository(tmp_path / "repo")


@pytest.fixture
def disk(url: str) -> Disk:
    return Disk("v1", url)


def test_the_session_of_the_readme(run: Command, disk: Disk) -> None:
    disk.write((5000, noise(100, 1)))
    assert "at most 4.0 KiB" in run("diff", "v1", "--stat")
    said = run("commit", "v1", "-m", "fix prices", "-t", "ticket=4711")
    assert "fix prices: 4.0 KiB changed" in said
    assert "1 version to push" in run("status", "v1")
    line = run("log", "v1").splitlines()[1]
    for part in ("HEAD, not pushed", "Test <test@example.org>", "fix prices  [ticket=4711]"):
        assert part in line
    assert "fix prices" not in run("log", IMAGE)
    assert "branch main is at" in run("push", "v1", "-q")
    assert "fix prices" in run("log", IMAGE).splitlines()[1]
    assert "nothing to push: branch main" in run("push", "v1")
    # Back, a branch of its own, and forward again.
    run("checkout", "v1", "main~1")
    disk.write((0, b"x"))
    run("commit", "v1", "-m", "another way", "-q")
    assert "branch side is at" in run("push", "v1", "--branch", "side", "-q")
    graph = run("log", IMAGE, "--graph").splitlines()
    assert graph[2] == "|/"
    assert "(side)" in graph[0]
    assert "(main)" in graph[1]
    assert "(main)" in run("checkout", "v1", "main")
    assert "side" in run("branch", IMAGE)
    run("tag", IMAGE, "v3", "side", "-m", "for later")
    assert "for later" in run("tag", "v1")
    assert "another way" in run("show", IMAGE, "v3")
    assert "only here" in run("show", f"{IMAGE}@v3", "--only")
    assert "checkout: to main" in run("reflog", "v1")
    assert "push: fix prices" in run("reflog", IMAGE, "main")
    run("branch", IMAGE, "-d", "side")
    run("tag", IMAGE, "-d", "v3")


def test_json_of_everything(run: Command, disk: Disk) -> None:
    disk.write((5000, noise(100, 1)))
    made = run.json("commit", "v1", "-m", "one", "--push")["v1"]
    assert made["changed_bytes"] == BLOCK
    assert run.json("push", "v1")["v1"]["moved"] is False
    pushed = made["push"]
    assert (pushed["branch"], pushed["id"], pushed["moved"]) == ("main", made["id"], True)
    newest, oldest = run.json("log", IMAGE)
    assert (newest["id"], newest["refs"], newest["pushed"]) == (made["id"], ["main"], True)
    assert newest["new"]["bytes"] == made["new_bytes"]
    assert oldest["new"] is None
    assert run.json("diff", IMAGE, "main~1", "main", "--stat")["chunks"] == 1
    assert run.json("diff", IMAGE, "main~1", "main", "--blocks") == [
        {"start": BLOCK, "length": BLOCK}
    ]
    assert run.json("show", "v1", "--only", "--data")["data_chunks"] == 8
    assert run.json("branch", "v1")[0]["followed"]
    assert run.json("tag", IMAGE, "v3")["id"] == made["id"]
    assert run.json("tag", IMAGE)[0]["tag"] == "v3"
    assert run.json("fetch", "v1")["diverged"] is False
    assert run.json("pull", "v1")["moved"] is False
    assert run.json("reflog", "v1")[0]["why"].startswith("push")
    status = run.json("status", "v1")
    assert (status["ahead"], status["behind"], status["branch"]) == (0, 0, "main")
    moved = run.json("checkout", "v1", "main~1")
    assert (moved["before"], moved["after"]) == (made["id"], oldest["id"])
    assert run.json("revert", "v1", "--to", "main")["after"] != made["id"]
    assert run.json("reset", "v1", "HEAD~1")["kept"]
    disk.write((0, b"z"))
    assert run.json("stash", "v1", "-m", "aside")["message"] == "aside"
    assert len(run.json("stash", "v1", "list")) == 1
    assert run.json("stash", "v1", "pop")["base"] == oldest["id"]


@needs_ext4
def test_files_that_differ(run: Command, tmp_path: Path) -> None:
    url = f"cp://{tmp_path / 'repo'}"
    for number in (1, 2):
        tree, image = tmp_path / f"tree{number}", tmp_path / f"{number}.img"
        tree.mkdir()
        (tree / "kept").write_text("kept")
        (tree / f"only-{number}").write_text("x" * number)
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, image], check=True)
        with open_store(url, create=True) as store, RawSource(str(image)) as source:
            generate(source, store, IMAGE, author="a", message=f"{number}")
    lines = run("diff", url, "main~1", "main").splitlines()
    assert "D  only-1  1 B" in lines
    assert "A  only-2  2 B" in lines
    found = {one["path"]: one["kind"] for one in run.json("diff", url, "main~1", "main")}
    assert found["only-2"] == "added"
    assert "kept" not in found or found["kept"] == "modified"


# ---- bad input: one line, and nothing lost


def test_an_unknown_version(run: Command, disk: Disk) -> None:
    run("checkout", "v1", "mian", code=3)
    assert "did you mean main?" in run.said
    run("log", IMAGE, "nonsense", code=3)
    assert "no version 'nonsense'" in run.said
    run("diff", IMAGE, "main~7", "main", code=3)
    assert "has only 0 versions before it" in run.said
    disk.check()


def test_an_ambiguous_id(run: Command, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/versions/test_move.py makes two ids that begin alike; here it is what is said."""
    from horcrux_nbd.errors import UsageError
    from horcrux_nbd.repository.repository import Repository

    def ambiguous(*_: object) -> None:
        raise UsageError("id 1f3a of AMCC is ambiguous (1f3a9c12, 1f3abb00): write more digits")

    monkeypatch.setattr(Repository, "_by_id", ambiguous)
    run("checkout", "v1", "1f3a", code=2)
    assert "write more digits" in run.said


def test_an_empty_commit(run: Command, disk: Disk) -> None:
    run("commit", "v1", "-m", "nothing", code=2)
    assert "nothing to commit: v1 has no changes (--allow-empty" in run.said
    run("commit", "v1", "-m", "nothing", "--allow-empty")


def test_a_branch_that_moved(run: Command, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk("v2", disk.url)
    for name in ("v1", "v2"):
        other = Disk.__new__(Disk)
        other.name = name
        other.model = disk.model
        other.write((0, noise(10, name)))
        run("commit", name, "-m", f"by {name}", "-q")
    monkeypatch.setenv("HORCRUX_AUTHOR", "Eve <eve@example.org>")
    run("push", "v2", "-q")
    run("push", "v1", code=5)
    for part in ("moved by Eve", "by v2", "another branch"):
        assert part in run.said
    run("pull", "v1", code=5)
    assert "have diverged" in run.said
    run("push", "v1", "--branch", "mine", "-q")


def test_a_full_disk_while_committing(
    run: Command, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from horcrux_nbd import files

    disk.write((0, noise(BLOCK, 1)))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        run("commit", "v1", "-m", "x", code=8)
        assert "space" in run.said
    disk.check()
    run("commit", "v1", "-m", "x", "-q")


def test_a_store_that_is_gone(run: Command, disk: Disk, tmp_path: Path) -> None:
    disk.write((0, b"x"))
    run("commit", "v1", "-m", "x", "-q")
    (tmp_path / "repo").rename(tmp_path / "gone")
    run("push", "v1", code=3)
    assert str(tmp_path / "repo") in run.said
    # What is here is shown all the same.
    assert "not pushed" in run("log", "v1", "-n", "1")
    (tmp_path / "gone").rename(tmp_path / "repo")
    run("push", "v1", "-q")


def test_a_version_of_another_size(run: Command, disk: Disk) -> None:
    """Handled: the volume is of that size then, since nobody has it open."""
    make_image(Path(disk.url.removeprefix("cp://")), noise(1 << 20))
    run("pull", "v1")
    assert run.json("status", "v1")["size"] == 1 << 20
    run("checkout", "v1", "main~1")
    disk.check()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["commit", "nope", "-m", "x"], 3, "no volume 'nope'"),
        (["commit", "../x", "-m", "x"], 2, "cannot name a volume"),
        (["commit", "v1", "-m", "x", "-t", "ticket"], 2, "write KEY=VALUE"),
        (["commit", "v1", "-m", "x", "--before", "exit 3"], 1, "before the freeze failed"),
        (["push", "v1", "--branch", "a/b"], 2, "cannot name a branch"),
        (["checkout", "v1", "main", "--stash", "--discard"], 2, "exclude each other"),
        (["checkout", "v1", "a b"], 2, "is no ref"),
        (["diff", "v1", "--stat", "--blocks"], 2, "exclude each other"),
        (["diff", IMAGE], 2, "say what to compare"),
        (["branch", IMAGE, "-d", "prices"], 3, "no branch 'prices'"),
        (["branch", IMAGE, "main"], 2, "exists already"),
        (["tag", IMAGE, "main"], 2, "has a branch 'main'"),
        (["tag", IMAGE, "-d", "v3"], 3, "no tag 'v3'"),
        (["reflog", IMAGE, "mian"], 3, "did you mean main"),
        (["stash", "v1"], 2, "has no changes"),
        (["stash", "v1", "pop"], 3, "has no stash 0"),
        (["revert", "v1"], 3, "has only 0 versions before it"),
        (["log", "nothing-like-it"], 3, "no remote"),
    ],
)
def test_bad_input_is_one_line(
    run: Command, disk: Disk, words: list[str], code: int, said: str
) -> None:
    run(*words, code=code)
    assert said in run.said
    disk.check()


def test_git_finds_it() -> None:
    """`git horcrux log` runs `git-horcrux log`, which is this program."""
    from importlib.metadata import entry_points

    (found,) = entry_points(group="console_scripts", name="git-horcrux")
    assert found.load() is main
