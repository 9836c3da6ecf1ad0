"""Records: the small JSON values that are not objects (docs/format.md, "Records").

`horcrux.json`, branch records and tags have no id that would prove them, so each carries a check
over its other members. It finds damage, not malice: whoever can write to a store can move a branch.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from ..errors import Damaged, EnvironmentProblem, UsageError
from ..units import KiB

MAX_RECORD = 64 * KiB  # bytes of JSON; bounds what a reader allocates
VERSION = 1
_CHECK_DIGITS = 32


def canonical(value: Any) -> bytes:
    """The one JSON form of `value`: ASCII, sorted keys, no spaces, no fractions.

    Raises UsageError for text that is no Unicode, such as file names in another encoding.
    """
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if b"\\ud" in data:  # half a surrogate pair is an escape that no other language reads
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError("a name, message or tag is no valid text: write it in UTF-8") from None
    return data


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. ValueError for anything else, and for what canonical JSON lacks.

    Members may be there that this release does not know.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_members, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a member is there twice")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def text(value: Any) -> str:
    """`value` if it is text that can be printed and stored; ValueError else."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is no text")
    value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
    return value


def integer(value: Any) -> int:
    """`value` if it is a whole number; ValueError else (`true` and 1.0 are none)."""
    if type(value) is not int:
        raise ValueError(f"{value!r:.60} is no whole number")
    return value


def encode_record(members: dict[str, Any], indent: int | None = None) -> bytes:
    """A record with its version and check. Raises UsageError where it is over MAX_RECORD."""
    value = {**members, "version": VERSION}
    value["check"] = _check(value)
    data = (json.dumps(value, sort_keys=True, indent=indent) + "\n").encode("ascii")
    if len(data) > MAX_RECORD:
        raise UsageError(f"a message is over {MAX_RECORD // KiB} KiB: shorten it")
    return data


def decode_record(data: bytes, what: str) -> dict[str, Any]:
    """The members of a record. Raises Damaged, EnvironmentProblem for one of a later format."""
    try:
        if len(data) > MAX_RECORD:
            raise ValueError(f"it is over {MAX_RECORD // KiB} KiB")
        value = parse(data)
        given = text(value.pop("check", ""))
        if given != _check(value):
            raise ValueError("its check does not match")
        version = integer(value.pop("version", None))
    except (ValueError, UsageError) as error:
        raise Damaged(f"{what} is damaged ({error}): restore it from a copy") from None
    if version != VERSION:
        raise EnvironmentProblem(
            f"{what} is of format {version}, newer than this program: upgrade horcrux-nbd"
        )
    return value


def _check(value: dict[str, Any]) -> str:
    return blake3(canonical(value)).hexdigest()[:_CHECK_DIGITS]
