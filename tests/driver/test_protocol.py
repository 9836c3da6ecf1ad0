"""The protocol itself: bodies, media types, errors; without a Docker."""

from __future__ import annotations

import json
from datetime import datetime

from tests.attach.conftest import needs_fuse

from .support import DriverProcess

pytestmark = needs_fuse


def test_activate(alone: DriverProcess) -> None:
    assert alone.ask("Plugin.Activate") == {"Implements": ["VolumeDriver"]}


def test_scope(alone: DriverProcess) -> None:
    assert alone.ask("Capabilities") == {"Capabilities": {"Scope": "global"}}


def test_media_types(alone: DriverProcess) -> None:
    """The answer is in the version of the question."""
    for version in ("1", "1.1", "1.2", "1.3"):
        media = f"application/vnd.docker.plugins.v{version}+json"
        response, _ = alone.post("/VolumeDriver.List", b"{}", {"Accept": media})
        assert response.status == 200
        assert response.headers["Content-Type"] == media
    response, _ = alone.post("/VolumeDriver.List", b"", {"Accept": "*/*"})
    assert response.headers["Content-Type"] == "application/vnd.docker.plugins.v1.2+json"


def test_bodies_that_say_nothing(alone: DriverProcess) -> None:
    """As a retry of Docker's may send: an answer, and nothing is done."""
    for command in ("Create", "Remove", "Mount", "Unmount", "Path", "Get"):
        for body in (b"", b"null", b"{}", b"\n"):
            response, data = alone.post(f"/VolumeDriver.{command}", body)
            assert response.status == 200
            assert "names no volume" in json.loads(data)["Err"]
        for body in (b"[1]", b"3", b"{", b'{"Name": 3}', b'{"Name": null}', b"\xff"):
            response, data = alone.post(f"/VolumeDriver.{command}", body)
            assert response.status == 200
            assert "\n" not in json.loads(data)["Err"]
    assert alone.ask("List") == {"Volumes": []}


def test_no_options(alone: DriverProcess) -> None:
    alone.ask("Create", Name="v1", Opts=None)
    alone.ask("Create", Name="v2")
    assert [one["Name"] for one in alone.ask("List")["Volumes"]] == ["v1", "v2"]


def test_unknown_path(alone: DriverProcess) -> None:
    response, data = alone.post("/NetworkDriver.Join", b"{}")
    assert response.status == 404
    assert json.loads(data)["Err"]


def test_a_browser_is_refused(alone: DriverProcess) -> None:
    response, _ = alone.post("/VolumeDriver.List", b"{}", {"Origin": "https://example.org"})
    assert response.status == 403


def test_created_at_is_a_time(alone: DriverProcess) -> None:
    """Docker drops the whole answer of a Get whose time it cannot read."""
    alone.ask("Create", Name="v1")
    for found in (alone.ask("Get", Name="v1")["Volume"], alone.ask("List")["Volumes"][0]):
        when = datetime.fromisoformat(found["CreatedAt"])
        assert when.tzinfo is not None
        assert abs((datetime.now(when.tzinfo) - when).total_seconds()) < 60
