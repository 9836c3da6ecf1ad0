"""The master keys that this host has: of repositories that were unlocked here.

One file for each repository, of mode 0600 in a folder of mode 0700: below the folder of sockets,
which a reboot empties, or below the host's state, for servers that start unattended. A server finds
its key there itself, so none ever is in a command line or an environment. `HORCRUX_KEY_FILE` names
a key file instead (its path; the key itself is in the file).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

from .. import files, paths
from ..chunkstore import open_store
from ..chunkstore.base import ChunkStore
from ..errors import EnvironmentProblem, KeyRequired, UsageError
from .objects import PLAIN, Form

# encryption.py and keys.py are imported where they are needed: `cryptography` takes its time, and
# who reads a plain repository does without.

FOLDER = "keys"
KEY_FILE = "HORCRUX_KEY_FILE"

_ID = re.compile(r"[0-9A-Za-z]{1,64}")
_lock = threading.Lock()
_known: dict[str, bytes] = {}  # of this process, by the repository's id


def _folders() -> tuple[Path, Path]:
    return paths.run() / FOLDER, paths.root() / FOLDER


def use_key_file(path: str) -> None:
    """Let this process, and those that it starts, use the key file at `path`."""
    os.environ[KEY_FILE] = os.path.abspath(path)


def is_id(repository_id: str) -> bool:
    """Whether it can be the id of an encrypted repository: it becomes a file's name."""
    return bool(_ID.fullmatch(repository_id))


def _path(folder: Path, repository_id: str) -> Path:
    if not is_id(repository_id):
        raise UsageError(f"{repository_id!r:.80} is no id of an encrypted repository")
    return folder / f"{repository_id}.key"


def find(repository_id: str) -> bytes | None:
    """The master key of a repository, where this host has it. Raises UsageError for a bad file."""
    with _lock:
        if repository_id in _known:
            return _known[repository_id]
    for folder in _folders():
        path = _path(folder, repository_id)
        if path.exists():
            from .keys import MASTER, read_key_file

            secret = read_key_file(path)
            if secret.kind != MASTER or secret.repository_id != repository_id:
                raise UsageError(f"{path} is not the key that it is named after: remove it")
            return secret.value
    return None


def is_known(repository_id: str) -> bool:
    """Whether this host has a key of that repository."""
    if repository_id in _known:
        return True
    return is_id(repository_id) and any(
        _path(folder, repository_id).exists() for folder in _folders()
    )


def is_at_hand(repository_id: str) -> bool:
    """Whether a key of that repository is here, or a key file that may be one."""
    return is_known(repository_id) or bool(os.environ.get(KEY_FILE))


def remember(repository_id: str, master: bytes) -> None:
    """Keep a master key in this process's memory."""
    with _lock:
        _known[repository_id] = master


def keep(repository_id: str, master: bytes, *, for_good: bool = False) -> Path:
    """Keep a master key on this host until a reboot, or `for_good`; where."""
    from .keys import export_master

    folder = _folders()[for_good]
    files.make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    path = _path(folder, repository_id)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    export_master(path, repository_id, master)
    return path


def forget(repository_id: str) -> bool:
    """Remove the key from this host; whether it was there. A server that runs keeps its own."""
    found = False
    with _lock:
        found = _known.pop(repository_id, None) is not None
    for folder in _folders():
        with contextlib.suppress(FileNotFoundError):
            _path(folder, repository_id).unlink()
            found = True
    return found


def locked(url: str) -> str:
    """What to do about a repository whose key is not here."""
    return (
        f"{url} is encrypted, and this host does not have its key: `horcrux-cli key unlock {url}`, "
        f"or name a key file in {KEY_FILE}"
    )


def form_of_host(repository_id: str, url: str, *, encrypted: bool = True) -> Form:
    """The form of a repository, by a key that this host has. Asks nothing of the store at `url`,
    unless a key file is named: what it opens is there.

    Raises KeyRequired where it is encrypted and there is no key; with a key file StoreError.
    """
    if not encrypted:
        return PLAIN
    from .encryption import EncryptedForm
    from .keys import MASTER, read_key_file, unlock

    master = find(repository_id)
    if master is None and (path := os.environ.get(KEY_FILE)):
        secret = read_key_file(path)
        if secret.kind != MASTER:
            with open_store(url) as store:
                master = unlock(store, repository_id, secret)[0]
            remember(repository_id, master)
        elif secret.repository_id == repository_id:
            master = secret.value
    if master is None:
        raise KeyRequired(locked(url))
    return EncryptedForm(master)


def form_of(store: ChunkStore, repository_id: str, cipher: str, check: str) -> Form:
    """The form of the encrypted repository in `store`, whose configuration says `check`.

    By a key that this host has, or the key file that `HORCRUX_KEY_FILE` names. Raises KeyRequired,
    EnvironmentProblem for a cipher of a later release.
    """
    from .encryption import CIPHER, EncryptedForm, key_check
    from .keys import read_key_file, unlock

    if cipher != CIPHER:
        raise EnvironmentProblem(
            f"{store.url} is encrypted in a way ({cipher!r:.60}) that this program does not know: "
            "upgrade horcrux-nbd"
        )
    master = find(repository_id)
    if master is None and (path := os.environ.get(KEY_FILE)):
        master = unlock(store, repository_id, read_key_file(path))[0]
        remember(repository_id, master)
    if master is None:
        raise KeyRequired(locked(store.url))
    if key_check(master, repository_id) != check:
        raise KeyRequired(
            f"the key that this host has for {store.url} is not its key: somebody replaced the "
            "repository, or `horcrux-cli key lock` and unlock it anew"
        )
    return EncryptedForm(master)
