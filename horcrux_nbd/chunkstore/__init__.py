"""Chunk stores: key → bytes services at a URL (`cp://`, `scp://`, `s3://`, `minio://`)."""

from __future__ import annotations

from collections.abc import Sequence

from .base import ChunkStore, Stat
from .mirror import MirrorStore
from .retry import RetryStore
from .url import StoreURL, parse_store_url

__all__ = ["ChunkStore", "Stat", "StoreURL", "open_mirrored", "open_store", "parse_store_url"]

OPEN_LIMIT = 2.0  # seconds; whoever types a wrong host wants to hear so, a hiccup may pass
LONGEST_TIMEOUT = 15.0  # seconds without an answer; a quarter of the default limit


def open_store(
    url: str | StoreURL,
    *,
    create: bool = False,
    limit: float = 60.0,
    concurrency: int | None = None,
    check: bool = True,
) -> ChunkStore:
    """The store at `url`, wrapped so that an operation waits up to `limit` seconds for its return.

    Looks at once whether the place is there and lets us in; `create` makes it (never a bucket).
    With `check=False` nothing is asked until the first operation, for whoever can do without the
    store for a while. Raises UsageError, StoreMissing, StoreRefused, StoreUnavailable.
    """
    target = parse_store_url(url) if isinstance(url, str) else url
    store = _make(target, max(1.0, min(LONGEST_TIMEOUT, limit / 4)), concurrency)
    try:
        if create or check:
            opening = RetryStore(store, store.timeout + min(OPEN_LIMIT, limit))
            if create:
                opening.prepare()
            else:
                opening.check()
    except BaseException:
        store.close()
        raise
    return RetryStore(store, limit)


def open_mirrored(
    url: str, mirrors: Sequence[str], *, limit: float = 60.0, check: bool = True
) -> ChunkStore:
    """As `open_store`: the store at `url`, whose reads fall over to `mirrors`. For reading: whoever
    wants to know what `url` itself holds opens that alone.

    An answer of any of them will do, so a store that is away costs its time-out once in a while,
    and only where all are away is it waited for.
    """
    if not mirrors:
        return open_store(url, limit=limit, check=check)
    timeout = max(1.0, min(LONGEST_TIMEOUT, limit / (2 * (1 + len(mirrors)))))
    stores: list[ChunkStore] = []
    try:
        for one in (url, *mirrors):
            stores.append(_make(parse_store_url(one), timeout, None))
        both = MirrorStore(stores)
        if check:
            RetryStore(both, both.timeout + min(OPEN_LIMIT, limit)).check()
    except BaseException:
        for store in stores:
            store.close()
        raise
    return RetryStore(both, limit)


def _make(url: StoreURL, timeout: float, concurrency: int | None) -> ChunkStore:
    # Each kind is imported when it is used: boto3 alone takes 0.3 s and 40 MB.
    if url.scheme == "cp":
        from .local import LocalStore
        from .timed import TimedStore, is_far

        near = LocalStore(url, concurrency=concurrency)
        return TimedStore(near, timeout) if is_far(url.path) else near
    if url.scheme == "scp":
        from .sftp import SftpStore

        return SftpStore(url, timeout=timeout, concurrency=concurrency)
    from .s3 import S3Store

    return S3Store(url, timeout=timeout, concurrency=concurrency)
