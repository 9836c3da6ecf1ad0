"""Store URLs: what is understood, what is refused, and that no secret is repeated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.chunkstore import StoreURL, parse_store_url
from horcrux_nbd.errors import UsageError

CANONICAL = {
    "cp:///srv/images": "cp:///srv/images",
    "cp:///srv//images/": "cp:///srv/images",
    "CP:///srv/images": "cp:///srv/images",
    "cp:///srv/with space/%41?x#y@z:1": "cp:///srv/with space/%41?x#y@z:1",
    "/srv/images": "cp:///srv/images",
    "//srv/images": "cp:///srv/images",
    "/srv/a/../b": "cp:///srv/b",
    "scp://host:/srv": "scp://host:/srv",
    "scp://host/srv": "scp://host:/srv",
    "scp://muthu@kural:/opt/horcrux-mysql-amcc": "scp://muthu@kural:/opt/horcrux-mysql-amcc",
    "scp://u@host:2222/srv/x/": "scp://u@host:2222/srv/x",
    "scp://u@host:2222:/srv/x": "scp://u@host:2222/srv/x",
    "scp://u@host//srv/./x": "scp://u@host:/srv/x",
    "scp://u@[::1]:2222/srv": "scp://u@[::1]:2222/srv",
    "scp://[fe80::1]:/srv": "scp://[fe80::1]:/srv",
    "scp://u@dom.example@host:/srv": "scp://u@dom.example@host:/srv",
    "scp://host:/srv/a@b:c": "scp://host:/srv/a@b:c",
    "scp://host:22/srv/a@b": "scp://host:22/srv/a@b",
    "s3://bucket": "s3://bucket",
    "s3://bucket@eu-central-1": "s3://bucket?region=eu-central-1",
    "s3://bucket@eu-central-1/a/b/": "s3://bucket/a/b?region=eu-central-1",
    "s3://bucket/a?region=r": "s3://bucket/a?region=r",
    "s3://bucket@r/a?region=r": "s3://bucket/a?region=r",
    "s3://bucket?endpoint=http://127.0.0.1:9/": "s3://bucket?endpoint=http://127.0.0.1:9",
    "s3://bucket?endpoint=https%3A%2F%2Fh%2Fbase": "s3://bucket?endpoint=https://h/base",
    "s3://bucket?endpoint=https://[::1]:9&region=r": "s3://bucket?region=r&endpoint=https://[::1]:9",
    "minio://host:9000/bucket": "minio://host:9000/bucket",
    "minio://host/bucket/a/b": "minio://host/bucket/a/b",
    "minio://host:9000/bucket?tls=off": "minio://host:9000/bucket?tls=off",
    "minio://host:9000/bucket?tls=on": "minio://host:9000/bucket",
    "minio://[::1]:9000/bucket?region=x": "minio://[::1]:9000/bucket?region=x",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical(text: str) -> None:
    parsed = parse_store_url(text)
    assert str(parsed) == CANONICAL[text]
    assert parse_store_url(str(parsed)) == parsed


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = str(tmp_path)
    assert parse_store_url("./a").path == f"{here}/a"
    assert parse_store_url("a/b").path == f"{here}/a/b"
    assert parse_store_url(".").path == here
    assert parse_store_url("../a").path == f"{tmp_path.parent}/a"
    assert parse_store_url("~/a").path == f"{here}/home/a"
    with pytest.raises(UsageError, match=r"write \./NAME"):
        parse_store_url("plain")
    (tmp_path / "plain").mkdir()
    assert parse_store_url("plain").path == f"{here}/plain"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither a store nor a path"),
        ("http://host/path", "http:// is no store that Horcrux knows: use cp:///path, scp://"),
        ("sftp://host/path", "use cp:///path, scp://"),
        ("file:///path", "use cp:///path"),
        ("cp://relative/path", "absolute path"),
        ("cp://", "absolute path"),
        ("cp:///a\nb", "control characters"),
        ("scp://host", "absolute path is missing"),
        ("scp://host:relative", "absolute path is missing"),
        ("scp://host:/", "absolute path is missing"),
        ("scp://host:relative/path", "no host and port"),
        ("scp:///path", "host is missing"),
        ("scp://-oProxyCommand=x:/path", "character it cannot have"),
        ("scp://-u@host:/path", "user has a character"),
        ("scp://ho st:/path", "character it cannot have"),
        ("scp://host:0/path", "1 to 65535"),
        ("scp://host:70000/path", "1 to 65535"),
        ("scp://[::1/path", "no host and port"),
        ("scp://[zz]:/path", "no IPv6 address"),
        ("scp://host:/a/../b", "without '..'"),
        ("s3://", "cannot name a bucket"),
        ("s3://b", "cannot name a bucket"),
        ("s3://bucket@", "region behind @ is missing"),
        ("s3://bucket@no region", "no region"),
        ("s3://bucket@r1?region=r2", "two regions"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?region=", "empty"),
        ("s3://bucket?regoin=x", "unknown option 'regoin': known are region, endpoint"),
        ("s3://bucket?tls=off", "known are region, endpoint"),
        ("s3://bucket/../x", "no part that begins with a dot"),
        ("s3://bucket/a//b", "single slashes"),
        ("s3://bucket/" + "x/" * 400 + "y", "longer than 700"),
        ("s3://bucket?endpoint=host:9000", "write the endpoint as https://"),
        ("s3://bucket?endpoint=ftp://host", "write the endpoint as https://"),
        ("s3://bucket?endpoint=http://host:x", "endpoint is no URL"),
        ("s3://bucket?endpoint=http://host/?a=b", "write the endpoint"),
        ("minio://host:9000", "bucket is missing"),
        ("minio://host:9000/", "bucket is missing"),
        ("minio://host:9000:/bucket", "no host and port"),
        ("minio://host/bucket?tls=no", "tls is on or off"),
        ("minio://host/bucket?endpoint=x", "known are region, tls"),
        ("minio://user@host/bucket", "with a user"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_store_url(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "scp://user:Xs3cret@host:/path",
        "scp://user:Xs3cret@host:22/path",
        "scp://user:Xs3/cret@host:/path",
        "scp://user:Xs3@cret@host:/path",
        "scp://:Xs3cret@host:/path",
        "scp://user:22x/Xs3cret@host:/path",
        "s3://AKIAXYZ:Xs3cret@bucket/prefix",
        "s3://AKIAXYZ:Xs3/cret+x@bucket",
        "s3://bucket?secret_access_key=Xs3cret",
        "s3://bucket?aws_session_token=Xs3cret",
        "s3://bucket?password=Xs3cret",
        "s3://bucket?X-Amz-Signature=Xs3cret",
        "s3://bucket?region=r&access-key=Xs3cret",
        "s3://bucket?endpoint=https://me:Xs3cret@host",
        "minio://access:Xs3cret@host:9000/bucket",
        "minio://host:9000/bucket?secretKey=Xs3cret",
    ],
)
def test_a_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_store_url(text)
    message = str(caught.value)
    assert "Xs3" not in message
    assert "cret" not in message.replace("secret", "").replace("SECRET", "")
    assert "ssh-agent" in message or "~/.aws/credentials" in message


@pytest.mark.parametrize(
    "text",
    ["http://u:Xs3cret@h/", "scp://Xs3cret x@host:/p", "minio://Xs3cret@host/b", "Xs3?k=Xs3cret"],
)
def test_other_errors_show_nothing_before_the_at_sign(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_store_url(text)
    assert "Xs3cret" not in str(caught.value)


def test_service() -> None:
    assert parse_store_url("minio://h:9/bucket").service == "https://h:9"
    assert parse_store_url("minio://[::1]:9/bucket?tls=off").service == "http://[::1]:9"
    assert parse_store_url("s3://bucket?endpoint=http://h").service == "http://h"
    assert parse_store_url("s3://bucket").service == ""


names = st.text("abcXYZ019_-.", min_size=3, max_size=8).filter(lambda s: s[0].isalpha())
plain = st.text("abc019", min_size=3, max_size=8)
ports = st.none() | st.integers(1, 65535)
urls = st.one_of(
    st.builds(
        lambda parts: StoreURL("cp", path="/" + "/".join(parts)),
        st.lists(st.text("ab %?#@:é", min_size=1).filter(lambda s: s.strip(".")), min_size=1),
    ),
    st.builds(
        lambda user, host, port, parts: StoreURL(
            "scp", user=user, host=host, port=port, path="/" + "/".join(parts)
        ),
        st.just("") | names,
        names | st.just("::1"),
        ports,
        st.lists(st.text("ab %?#@:é", min_size=1), min_size=1),
    ),
    st.builds(
        lambda bucket, prefix, region: StoreURL("s3", bucket=bucket, prefix=prefix, region=region),
        plain,
        st.lists(plain).map("/".join),
        st.just("") | plain,
    ),
    st.builds(
        lambda host, port, bucket, tls: StoreURL(
            "minio", host=host, port=port, bucket=bucket, tls=tls
        ),
        names | st.just("::1"),
        ports,
        plain,
        st.booleans(),
    ),
)


@given(urls)
def test_every_url_survives_its_own_text(url: StoreURL) -> None:
    assert parse_store_url(str(url)) == url


@given(st.text(max_size=60) | st.text("scp3mino:/@?=&[]ab.%-", max_size=60))
def test_any_text_is_a_store_or_a_usage_error(text: str) -> None:
    try:
        url = parse_store_url(text)
    except UsageError:
        return
    assert parse_store_url(str(url)) == url
    assert url.scheme != "cp" or os.path.isabs(url.path)
