"""The version that a refresh begins from: where its files lie, and what its chunks hold."""

from __future__ import annotations

from .chunkstore import open_store
from .closing import Closing
from .names import Version
from .repository.repository import Repository
from .source import Layout, read_layout
from .volume.volume import Volume


class LastVersion(Closing):
    """A version of the repository at `url`, read through this host's cache. A context manager."""

    def __init__(self, url: str, version: Version) -> None:
        """Raises NotFound where there is no such version; StoreError."""
        with open_store(url) as store:
            resolved = Repository.open(store).resolve(version)
        self._commit = resolved.commit
        self._volume = Volume.open_version(url, resolved)

    def layout(self) -> Layout | None:
        """Where its files lie; None where it is no ext4. Raises Damaged, StoreError."""
        return read_layout(self._read) if self._commit.filesystem == "ext4" else None

    def chunk(self, number: int) -> bytes:
        """The bytes of one of its chunks; zeros behind its end."""
        size = self._commit.chunk_size
        return self._read(number * size, size)

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._volume.read_into(offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        self._volume.close()
