"""What Docker itself says of the containers that use a volume."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

log = logging.getLogger(__name__)

DEFAULT_HOST = "unix:///var/run/docker.sock"
TIMEOUT = 5.0  # seconds; Docker may be waiting for us just now
USING = ("running", "paused", "restarting")  # states in which a container's volumes are mounted


class Engine:
    """The Docker API at `host` (`$DOCKER_HOST`, or the usual socket). Connects when it is asked.

    Asks for containers only, never for volumes: for those Docker would ask this driver, and wait.
    """

    def __init__(self, host: str | None = None, timeout: float = TIMEOUT) -> None:
        self.host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client: Any = None

    def users(self, volume: str) -> list[str] | None:
        """Names of the containers that have `volume` mounted now; None if Docker does not say."""
        try:
            found = self._connected().containers(
                all=True, filters={"volume": volume, "status": list(USING)}
            )
        # Whatever the library and the HTTP below it raise: Docker is away, and that is no error.
        except Exception as error:
            log.debug("no answer from Docker on %s: %s", self.host, error)
            with self._lock:
                self._client = None
            return None
        return sorted(
            (container.get("Names") or ["?"])[0].lstrip("/")
            for container in found
            if any(mount.get("Name") == volume for mount in container.get("Mounts", ()))
        )

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                from docker import APIClient  # 0.3 s

                self._client = APIClient(base_url=self.host, version="auto", timeout=self._timeout)
            return self._client
