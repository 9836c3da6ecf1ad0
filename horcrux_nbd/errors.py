"""Every error that Horcrux raises on purpose.

One base class. A class says what the caller may do next: try again (`StoreUnavailable`), give up
this object (`Damaged`), choose another name (`NotFound`), wait for somebody (`Busy`). The message
is one line that says what is wrong, where, and what to do; `exit_code` is what the command line
exits with (docs/cli.md lists them).
"""

from __future__ import annotations

import errno


class HorcruxError(Exception):
    """Base of all. `errno` is what a block device reports when the error reaches it."""

    exit_code = 1
    errno = errno.EIO

    def __init__(self, message: str) -> None:
        # One line is a promise to the user; a library's message may hold several.
        super().__init__(" ".join(message.split()))


class UsageError(HorcruxError):
    """The request itself is wrong: a bad name, size, URL or option. Never try again."""

    exit_code = 2
    errno = errno.EINVAL


class NotFound(HorcruxError):
    """A repository, image, version, volume or path that does not exist."""

    exit_code = 3
    errno = errno.ENOENT


class Damaged(HorcruxError):
    """Stored bytes are not what was written. Names the object. A good copy elsewhere may do."""

    exit_code = 4


class Busy(HorcruxError):
    """Somebody else holds it: a lock, an open file, a branch that has moved."""

    exit_code = 5
    errno = errno.EBUSY


class NoSpace(HorcruxError):
    """A local disk, a store or a quota is full. Nothing acknowledged is lost."""

    exit_code = 8
    errno = errno.ENOSPC


class EnvironmentProblem(HorcruxError):
    """This machine lacks something (a program, a kernel module, a matching Python)."""

    exit_code = 9
    errno = errno.ENOTSUP


class Incomplete(HorcruxError):
    """The work was done, but not all of it is sound, such as files that changed while read."""

    exit_code = 10


class KeyRequired(HorcruxError):
    """An encrypted repository, and no key of it here, or not the right one. Nothing was read."""

    exit_code = 7
    errno = errno.EACCES


# ---- chunk stores -------------------------------------------------------------------------------


class StoreError(HorcruxError):
    """A store refused or broke an operation and trying again will not help."""

    exit_code = 6


class StoreUnavailable(StoreError):
    """The store did not answer, or asked to come back later. Trying again may help."""


class StoreRefused(StoreError):
    """Credentials, a host key, a certificate or a permission was refused. Do not try again."""

    exit_code = 7
    errno = errno.EACCES


class StoreMissing(StoreError):
    """The folder, bucket or host account that the URL names does not exist."""

    exit_code = 3
    errno = errno.ENOENT


class StoreFull(StoreError):
    """The store has no room left."""

    exit_code = 8
    errno = errno.ENOSPC


class KeyNotFound(StoreError):
    """There is no object under this key."""

    exit_code = 3
    errno = errno.ENOENT

    def __init__(self, url: str, key: str) -> None:
        super().__init__(f"{url}: no object {key!r}")
        self.url, self.key = url, key


class KeyExists(StoreError):
    """An exclusive put found the key taken. The bytes under it are untouched."""

    exit_code = 5
    errno = errno.EEXIST

    def __init__(self, url: str, key: str) -> None:
        super().__init__(f"{url}: {key!r} exists already")
        self.url, self.key = url, key
