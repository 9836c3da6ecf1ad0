"""Containers that use something of this host, asked of Docker's API.

The package `docker` comes with the extra `driver`: who asks without it is told so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .errors import EnvironmentProblem, HorcruxError

DEFAULT_HOST = "unix:///var/run/docker.sock"
TIMEOUT = 5.0  # seconds; Docker may be waiting for us just now
USING = ("running", "paused", "restarting")  # states in which a container's volumes are mounted

Entry = Mapping[str, Any]  # of a container, as the API lists it


class DockerAway(HorcruxError):
    """Docker did not answer."""


class Containers:
    """The Docker API at `host` (`$DOCKER_HOST`, or the usual socket).

    Asks for containers only, never for volumes: for those Docker would ask the volume driver, which
    may be who asks here.
    """

    def __init__(self, host: str | None = None, timeout: float = TIMEOUT) -> None:
        self.host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._timeout = timeout

    def using(self, wanted: Callable[[Entry], bool], **filters: Any) -> list[Entry]:
        """The containers that have a mount which is `wanted` now. Raises DockerAway."""
        found = self._ask("containers", all=True, filters={"status": list(USING), **filters})
        return [one for one in found if any(map(wanted, one.get("Mounts") or ()))]

    @contextlib.contextmanager
    def paused(self, containers: Iterable[Entry]) -> Iterator[list[str]]:
        """They stand still inside of the block; their names. One that was paused already stays so.

        Raises DockerAway; then none is paused.
        """
        names: list[str] = []
        with contextlib.ExitStack() as stack:
            for container in containers:
                if container.get("State") == "running":
                    self._ask("pause", container["Id"])
                    stack.callback(self._ask, "unpause", container["Id"])
                names.append(name_of(container))
            yield names

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        try:
            # A connection of its own, closed after it: the library's pool keeps one more for each
            # thread, and a driver lives for months.
            with contextlib.closing(self._connect()) as client:
                return getattr(client, what)(*arguments, **options)
        except HorcruxError:
            raise
        # Whatever the library and the HTTP below it raise.
        except Exception as error:
            raise DockerAway(f"Docker on {self.host} does not answer: {error}") from error

    def _connect(self) -> Any:
        try:
            from docker import APIClient  # 0.3 s
        except ImportError:
            raise EnvironmentProblem(
                "the Python package docker is missing: pip install 'horcrux-nbd[driver]'"
            ) from None
        return APIClient(base_url=self.host, version="auto", timeout=self._timeout)


def name_of(container: Entry) -> str:
    """What people call it."""
    return str((container.get("Names") or [container.get("Id", "?")[:12]])[0]).lstrip("/")
