"""Limits: what takes too long is an error in time, and is undone when it is done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from horcrux_driver import records
from horcrux_driver.driver import Driver
from horcrux_driver.engine import Engine
from horcrux_driver.protocol import Protocol
from horcrux_nbd import host, server
from tests.attach.conftest import needs_fuse

from .conftest import clean_host

pytestmark = needs_fuse


@pytest.fixture
def driver(configured: Path) -> Iterator[Driver]:
    yield Driver(Engine("unix:///nonexistent"))
    clean_host()


def test_a_mount_that_takes_too_long(driver: Driver) -> None:
    """An error in time; what comes after it is undone, and the next one works."""

    async def play() -> None:
        protocol = Protocol(driver, work_limit=0.05)
        async with TestClient(TestServer(protocol.application())) as client:

            async def ask(command: str, **members: Any) -> dict[str, Any]:
                response = await client.post(f"/VolumeDriver.{command}", data=json.dumps(members))
                return dict(json.loads(await response.read()))

            driver.create("vol", {})
            said = await ask("Mount", Name="vol", ID="1")
            assert "takes longer than 0 s" in said["Err"]
            assert not (await ask("Get", Name="vol")).get("Err")
        await protocol.close()  # returns when all that was begun is done or undone

    asyncio.run(play())
    assert host.mounts("vol") == []
    assert server.running("vol") is None
    record = records.load("vol")
    assert record is not None
    assert not record.wanted
    assert driver.mount("vol", "2")
    driver.unmount("vol", "2")
