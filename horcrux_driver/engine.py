"""What Docker itself says of the containers that use a volume."""

from __future__ import annotations

import logging

from horcrux_nbd.containers import Containers, DockerAway, Entry, name_of

log = logging.getLogger(__name__)


class Engine:
    """The Docker API at `host`; see `Containers`."""

    def __init__(self, host: str | None = None) -> None:
        self._containers = Containers(host)

    def users(self, volume: str) -> list[str] | None:
        """Names of the containers that have `volume` mounted now; None if Docker does not say."""

        def wanted(mount: Entry) -> bool:
            return mount.get("Name") == volume

        try:
            return sorted(map(name_of, self._containers.using(wanted, volume=volume)))
        except DockerAway as error:
            log.debug("%s", error)
            return None
