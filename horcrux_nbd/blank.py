"""A new, empty volume: the first version of an image that is in no repository yet.

What the file system consists of is made on this host, as if it were a commit that was not pushed
yet; the first push makes the image, and the repository where there is none.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from . import host, paths
from .chunkstore import open_store
from .errors import NotFound, StoreError, UsageError
from .generate import chunk_numbers
from .names import check_name
from .repository.commits import DEFAULT_CHUNK, Commit, now
from .repository.objects import NULL_ID, PLAIN, Form, Kind
from .repository.repository import Repository
from .repository.writer import ObjectWriter, write_index
from .source import Source, empty_filesystem
from .volume.local import open_objects
from .volume.state import VolumeState, check_folder, lay_volume

ANSWER_LIMIT = 5.0  # seconds for the repository to say whether it is encrypted
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
    default `local_repository`), which need not be there or answer before the first push. Raises
    UsageError where there is such a volume, or the size is too small; EnvironmentProblem;
    KeyRequired where the repository is encrypted and this host has no key.
    """
    folder, image = host.folder_of(name), check_name("image", image or name)
    if host.exists(name):
        raise UsageError(f"volume {name!r} exists already: choose another name, or remove it first")
    form, repository_id = _form(url)
    with host.locked(name), empty_filesystem(size, filesystem, label=image) as source:
        check_folder(folder)
        with open_objects(folder, create=True) as objects:
            own = Repository(objects, "", DEFAULT_CHUNK, form)
            commit, base = _store(source, own, image, author)
        return lay_volume(
            folder,
            commit,
            VolumeState(
                repository=url or local_repository(),
                repository_id=repository_id,
                image=image,
                ref="main",
                base=base.hex(),
                size=commit.size,
                chunk_size=commit.chunk_size,
                layers=(),
                encrypted=form.encrypted,
                unborn=True,
            ),
        )


def _form(url: str | None) -> tuple[Form, str]:
    """How objects that are to go to `url` are stored, and the id of that repository where it is
    encrypted. One that is not there yet, or away, will not be: the push would say so.
    """
    if url is not None:
        with (
            contextlib.suppress(StoreError, NotFound),
            open_store(url, limit=ANSWER_LIMIT) as store,
        ):
            found = Repository.open(store)
            if found.form.encrypted:
                return found.form, found.id
    return PLAIN, ""


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
