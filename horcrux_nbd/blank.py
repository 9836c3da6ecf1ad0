"""A new, empty volume: the first version of an image that is in no repository yet.

What the file system consists of is made on this host, as if it were a commit that was not pushed
yet; the first push makes the image, and the repository where there is none.
"""

from __future__ import annotations

from dataclasses import replace

from . import host, paths
from .errors import UsageError
from .generate import chunk_numbers
from .names import check_name
from .repository.commits import DEFAULT_CHUNK, Commit, now
from .repository.objects import NULL_ID, Kind
from .repository.repository import Repository
from .repository.writer import ObjectWriter, write_index
from .source import Source, empty_filesystem
from .volume.local import open_objects
from .volume.state import VolumeState, check_folder, lay_volume

MESSAGE = "new, empty file system"


def local_repository() -> str:
    """The URL of this host's own repository, where nobody said another."""
    return f"cp://{paths.root()}/repository"


def create(
    name: str,
    size: int,
    filesystem: str = "ext4",
    *,
    image: str | None = None,
    url: str | None = None,
    author: str,
) -> VolumeState:
    """Make a volume of `size` bytes with an empty file system ("ext4", "xfs") that is root's.

    It will be the first version of `image` (by default `name`) in the repository at `url` (by
    default `local_repository`), of which nothing is asked before the first push. Raises UsageError
    where there is such a volume, or the size is too small; EnvironmentProblem.
    """
    folder, image = host.folder_of(name), check_name("image", image or name)
    if host.exists(name):
        raise UsageError(f"volume {name!r} exists already: choose another name, or remove it first")
    with host.locked(name), empty_filesystem(size, filesystem, label=image) as source:
        check_folder(folder)
        with open_objects(folder, create=True) as objects:
            commit, base = _store(source, Repository(objects, "", DEFAULT_CHUNK), image, author)
        return lay_volume(
            folder,
            commit,
            VolumeState(
                repository=url or local_repository(),
                repository_id="",
                image=image,
                ref="main",
                base=base.hex(),
                size=commit.size,
                chunk_size=commit.chunk_size,
                layers=(),
                unborn=True,
            ),
        )


def _store(source: Source, repository: Repository, image: str, author: str) -> tuple[Commit, bytes]:
    commit = Commit(
        image=image,
        size=source.size,
        chunk_size=repository.chunk_size,
        index=NULL_ID,
        parents=(),
        author=author,
        time=now(),
        message=MESSAGE,
        filesystem=source.filesystem,
    )
    size = commit.chunk_size
    with ObjectWriter(repository) as writer:
        chunks = [
            (number, writer.write(Kind.CHUNK, source.read(number * size, size)))
            for number in chunk_numbers(source, size)
        ]
        found = [(number, oid) for number, oid in chunks if oid != NULL_ID]
        root = write_index(writer, None, commit.levels, found, keep=commit.chunks)
        writer.barrier()
        commit = replace(commit, index=root)
        base = writer.write(Kind.COMMIT, commit.encode())
        writer.barrier()
    return commit, base
