"""horcrux.json: which format a repository has, and whether it is encrypted (docs/format.md)."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..chunkstore.base import ChunkStore
from ..errors import Damaged, EnvironmentProblem, KeyExists, KeyNotFound, NotFound, UsageError
from . import keyring
from .commits import check_chunk_size
from .objects import PLAIN, Form
from .records import MAX_RECORD, decode_record, integer, text

if TYPE_CHECKING:
    from .keys import Secret
    from .repository import Repository

CONFIG_KEY = "horcrux.json"
FORMAT = 1
HASH = "blake3-248-kind"
KEYED_HASH = "blake3-248-kind-keyed"
ENCRYPTION = "encryption"  # in `features`


@dataclass(frozen=True)
class Config:
    """What horcrux.json says. `chunk_size` is for new images, bytes."""

    id: str
    chunk_size: int
    cipher: str = ""  # empty: not encrypted
    check: str = ""  # tells a wrong master key

    @property
    def encrypted(self) -> bool:
        return bool(self.cipher)


def read_config(store: ChunkStore) -> Config:
    """Needs no key. Raises NotFound where there is no repository, EnvironmentProblem for one of a
    later format, Damaged, StoreError.
    """
    try:
        data = store.get(CONFIG_KEY, 0, MAX_RECORD + 1)
    except KeyNotFound:
        raise NotFound(
            f"{store.url} holds no Horcrux repository (no {CONFIG_KEY}): check the URL, or "
            "make one with `horcrux-cli generate`"
        ) from None
    what = f"{store.url}: {CONFIG_KEY}"
    config = decode_record(data, what)
    try:
        form, hash_name = integer(config["format"]), text(config["hash"])
        features = [text(feature) for feature in config["features"]]
        repository_id, chunk_size = text(config["id"]), integer(config["chunk_size"])
        encrypted = (form, hash_name, features) == (FORMAT, KEYED_HASH, [ENCRYPTION])
        if not encrypted and (form, hash_name, features) != (FORMAT, HASH, []):
            raise EnvironmentProblem(
                f"{store.url} is a repository of format {form} ({hash_name}, needs "
                f"{', '.join(features) or 'no extras'}), newer than this program, which reads "
                f"format {FORMAT} ({HASH}): upgrade horcrux-nbd"
            )
        check_chunk_size(chunk_size)
        if not encrypted:
            return Config(repository_id, chunk_size)
        details = config["encryption"]
        cipher, check = text(details["cipher"]), text(details["check"])
        if not cipher or not keyring.is_id(repository_id):
            raise ValueError("cipher or id")
        return Config(repository_id, chunk_size, cipher, check)
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise Damaged(f"{what} is damaged ({error!r}): restore it from a copy") from None


def form_of(store: ChunkStore, config: Config) -> Form:
    """How the repository in `store` is stored, by the key that this host has. Raises KeyRequired;
    Damaged where one that was encrypted is not any more.
    """
    if config.encrypted:
        return keyring.form_of(store, config.id, config.cipher, config.check)
    # Else who can write to the store could put a plain repository in place of an encrypted one,
    # and have what is pushed next in the clear.
    if keyring.is_known(config.id):
        raise Damaged(
            f"{store.url}: {CONFIG_KEY} says that the repository is not encrypted, and it was: "
            "somebody replaced it; restore it from a copy"
        )
    return PLAIN


def first_key(store: ChunkStore, config: dict[str, Any], secret: Secret) -> str:
    """Let `config` be that of an encrypted repository, and store its first key; where."""
    from . import encryption, keys

    master = secrets.token_bytes(encryption.MASTER_SIZE)
    repository_id = config["id"]
    config |= {
        "hash": KEYED_HASH,
        "features": [ENCRYPTION],
        "encryption": {
            "cipher": encryption.CIPHER,
            "check": encryption.key_check(master, repository_id),
        },
    }
    slot = keys.make_slot(secret, master, repository_id)
    keys.add_slot(store, slot)
    keyring.remember(repository_id, master)
    return slot.key


def copy_keys(source: Repository, store: ChunkStore) -> int:
    """Bring the keys of an encrypted repository to a copy of it that lacks them; how many."""
    if not source.form.encrypted:
        return 0
    from . import keys

    missing = set(keys.slot_keys(source.store)) - set(keys.slot_keys(store))
    for key in sorted(missing):
        slot = keys.read_slot(source.store, key)
        with contextlib.suppress(KeyExists):
            store.put_exclusive(key, keys.encode_slot(slot))
    return len(missing)
