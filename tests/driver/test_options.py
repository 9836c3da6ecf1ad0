"""What a Docker volume is made from: names, options, defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from horcrux_driver import options, records
from horcrux_driver.options import Options, check_docker_name, host_name, parse
from horcrux_driver.records import Record
from horcrux_nbd import config
from horcrux_nbd.errors import Damaged, UsageError
from horcrux_nbd.names import MAX_NAME, check_name
from horcrux_nbd.units import GiB, MiB

FILE = Path("/etc/horcrux/config.toml")
TEAM = '[remotes.team]\nurl = "cp:///team"\n'
OTHER = '[remotes.other]\nurl = "cp:///other"\n'


def parsed(name: str, text: str = "", /, **given: str) -> Options:
    spelled = {key.replace("_", "-"): value for key, value in given.items()}
    return parse(name, spelled, config.parse(text, FILE))


def refused(name: str, text: str = "", /, **given: str) -> str:
    with pytest.raises(UsageError) as caught:
        parsed(name, text, **given)
    return str(caught.value)


def test_as_the_original_wrote_them() -> None:
    given = {"--name": "AMCC", "--access": "scp://muthu@kural:/opt/horcrux-mysql-amcc"}
    found = parse("v1", given, config.parse("", FILE))
    assert (found.image, found.ref) == ("AMCC", "main")
    assert found.access == "scp://muthu@kural:/opt/horcrux-mysql-amcc"
    assert (
        parse("v1", {"-name": "AMCC", "access": "/r"}, config.parse("", FILE)).access == "cp:///r"
    )


def test_all_of_them() -> None:
    found = parsed(
        "v", TEAM, name="AMCC", access="team", ref="v3", readonly="", on_remove="keep",
        cache="20G", prefetch="all", fill_rate="20M", record="true",
    )  # fmt: skip
    assert found == Options(
        access="cp:///team", image="AMCC", ref="v3", read_only=True, on_remove="keep",
        cache=20 * GiB, prefetch="all", fill_rate=20 * MiB, record=60.0,
    )  # fmt: skip
    assert found.for_server == {"cache_size": str(20 * GiB)}


def test_unknown_ones_are_refused_and_their_values_not_repeated() -> None:
    said = refused("v", TEAM, secret_key="hunter2")
    assert "unknown option 'secret-key'" in said
    assert "hunter2" not in said
    for key in options.KNOWN:
        assert key in said


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    for url in ("s3://key:hunter2@bucket", "scp://me:hunter2@nas:/srv", "minio://k:hunter2@h:1/b"):
        assert "hunter2" not in refused("v", "", name="AMCC", access=url)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "../x"}, "cannot name an image"),
        ({"name": "AMCC", "ref": "../x"}, "is no ref"),
        ({"name": ""}, "-o name is empty"),
        ({"name": "AMCC", "access": "nowhere"}, "remotes of /etc/horcrux/config.toml: team"),
        ({"name": "AMCC", "readonly": "maybe"}, "say true or false"),
        ({"name": "AMCC", "on_remove": "ask"}, "use one of refuse, keep, delete"),
        ({"name": "AMCC", "cache": "1M"}, "at least 64M"),
        ({"name": "AMCC", "prefetch": "some"}, "use one of profile, all, none"),
        ({"name": "AMCC", "fs": "ext4"}, "for a new volume"),
        ({"size": "10G", "ref": "main"}, "which has no ref yet"),
        ({"size": "10G", "readonly": "1"}, "contradict each other"),
        ({"size": "ten"}, "is no size"),
        ({"size": "10G", "fs": "ntfs"}, "use one of ext4, xfs"),
        ({"access": "team"}, "-o name is missing"),
    ],
)
def test_refusals(given: dict[str, str], message: str) -> None:
    assert message in refused("v", TEAM, **given)


def test_twice_with_and_without_dashes() -> None:
    known = config.parse(TEAM, FILE)
    assert parse("v", {"name": "A", "--name": "A"}, known).image == "A"
    with pytest.raises(UsageError, match="there twice"):
        parse("v", {"name": "A", "--name": "B"}, known)
    with pytest.raises(UsageError, match="has to be text"):
        parse("v", {"name": ["A"]}, known)


def test_a_version_in_the_name() -> None:
    assert parsed("AMCC@main", TEAM) == Options(access="cp:///team", image="AMCC")
    assert parsed("AMCC@main~2", TEAM).ref == "main~2"
    both = TEAM + OTHER
    assert parsed("other/AMCC@v3", both) == Options(access="cp:///other", image="AMCC", ref="v3")
    assert "-o access is missing" in refused("AMCC@v3", both)
    assert parsed("AMCC@v3", both + '[docker]\naccess = "other"\n').access == "cp:///other"
    assert "leave one out" in refused("AMCC@v3", TEAM, name="OTHER")
    assert "leave one out" in refused("team/AMCC@v3", both, access="other")
    assert parsed("AMCC@v3", TEAM, readonly="").read_only


def test_defaults() -> None:
    text = TEAM + '[docker]\nname = "AMCC"\nref = "v3"\non-remove = "keep"\nreadonly = true\n'
    assert parsed("v", text) == Options(
        access="cp:///team", image="AMCC", ref="v3", read_only=True, on_remove="keep"
    )
    assert parsed("v", text, ref="v4", readonly="false") == Options(
        access="cp:///team", image="AMCC", ref="v4", on_remove="keep"
    )
    new = TEAM + '[docker]\nsize = "10G"\nfs = "xfs"\naccess = "team"\n'
    assert parsed("v", new) == Options(access="cp:///team", image="v", size=10 * GiB, fs="xfs")
    assert parsed("v", new, name="AMCC").size is None
    assert parsed("v", TEAM).adopt
    assert parsed("v", TEAM + '[docker]\naccess = "team"\n').adopt


def test_a_wrong_default_is_told_with_its_name() -> None:
    assert "on-remove=ask" in refused("v", TEAM + '[docker]\non-remove = "ask"\nname = "A"\n')
    with pytest.raises(UsageError, match=r"docker\.size"):
        config.parse("[docker]\nsize = [1]\n", FILE)


def test_names() -> None:
    for name in ("v", "v.1_x-y", "a" * MAX_NAME, "0" * 64, "A@b", "r/A@b~2", "A@b^"):
        assert check_docker_name(name) == name
        check_name("volume", host_name(name))
    for name in (
        "",
        ".",
        "-x",
        "a/b",
        "a" * 101,
        "a" * 300,
        "ü",
        "a@",
        "@b",
        "a/b/c@d",
        "a@b@c",
        None,
    ):
        with pytest.raises(UsageError):
            check_docker_name(name)


def test_names_on_the_host_are_never_the_same() -> None:
    names = ["A@b", "A.b", "A@b~", "r/A@b", "r.A@b", "r.A.b", "A@b^", "A@b~1"]
    assert len({host_name(name) for name in names}) == len(names)


# ---- records


def test_a_record_keeps_all() -> None:
    record = Record("A@b", "A.b-1", "2026-01-01T00:00:00Z", parsed("A@b", TEAM, cache="64M"))
    record = record.mounted("1").mounted("1").mounted("2")
    record.save()
    assert records.load("A@b") == record
    assert records.names() == ["A@b"]
    assert {key: one.count for key, one in record.mounts.items()} == {"1": 2, "2": 1}
    record = record.unmounted("1").unmounted("3").unmounted("2")
    assert record.wanted
    assert not record.unmounted("1").wanted
    records.remove("A@b")
    records.remove("A@b")
    assert records.names() == []
    assert records.load("A@b") is None


def test_a_record_of_another_boot() -> None:
    Record("v", "v", "t", Options()).mounted("1").save()
    record = records.load("v")
    assert record is not None
    replace(record, boot="before").save()
    record = records.load("v")
    assert record is not None
    assert not record.wanted


def test_a_record_of_a_later_release() -> None:
    """It may have options that this one does not know."""
    Record("v", "v", "t", Options(image="AMCC")).save()
    (file,) = records.folder().iterdir()
    file.write_text(file.read_text().replace('"image"', '"tomorrow": 1,\n"image"'))
    record = records.load("v")
    assert record is not None
    assert record.options.image == "AMCC"


def test_a_damaged_record() -> None:
    Record("v", "v", "t", Options()).save()
    (file,) = records.folder().iterdir()
    for text in ("{}", "[]", "{", '{"mounts": 3}'):
        file.write_text(text)
        with pytest.raises(Damaged, match="damaged"):
            records.load("v")


def test_what_is_no_name_has_no_record() -> None:
    for name in ("../x", "x" * 300, "ü" * 100, "nul\0", "."):
        assert records.load(name) is None
