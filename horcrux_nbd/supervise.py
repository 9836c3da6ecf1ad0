"""Brings back the server of an attached volume that died, before the file system on it notices.

Beside each nbdkit waits a shell (`server.py`), which wakes when nbdkit is gone, however it went,
and becomes this program: `python -m horcrux_nbd.supervise VOLUME`. It starts the server again,
connects the device to it, and ends; the new server has a shell of its own. Neither needs whoever
mounted the volume, be it the command line or the Docker driver.

Only kernel NBD can connect again; it holds requests back for `attach.base.DEAD_TIMEOUT` seconds. A
FUSE file answers them with errors at once, so there is nothing to save.
"""

from __future__ import annotations

import logging
import sys
import time

from . import host, server
from .attach import device as devices
from .attach.base import DEAD_TIMEOUT, FOLDER, Attachment
from .errors import HorcruxError

log = logging.getLogger(__name__)

# A server that dies at once each time must not take the whole processor.
SETTLED = 60.0  # seconds; who lived longer is started again at once
FIRST_DELAY, MOST_DELAY = 0.2, 15.0  # seconds; doubled each time
FREE_RESTARTS = 2  # without a delay


def delay_of(restarts: int, lived: float) -> float:
    """Seconds to wait before the next start of a server that lived so long (seconds)."""
    if lived > SETTLED or restarts < FREE_RESTARTS:
        return 0.0
    return float(min(FIRST_DELAY * 2 ** min(restarts - FREE_RESTARTS, 16), MOST_DELAY))


def revive(name: str) -> server.Server | None:
    """Mend an attached volume whose server died, where its device can connect again: start the
    server, connect. None where nothing was to be mended. Raises HorcruxError where it cannot.
    """
    with host.locked(name):
        attachment = Attachment.load(server.folder_of(name) / FOLDER)
        before = server.last(name)
        if attachment is None or before is None or not server.kept(name):
            return None
        if not devices.reconnects(attachment):
            return None
        found = devices.status(attachment)
        if found.alive:
            return None
        serving = server.running(name)
        if serving is None:
            serving = server.start(
                name,
                host.folder_of(name),
                socket=before.socket,
                read_only=before.read_only,
                options=before.options,
                restarts=before.restarts + 1,
            )
        devices.reconnect(attachment)
        return serving


def supervise(name: str, limit: float = DEAD_TIMEOUT) -> bool:
    """Start the server of volume `name` again, as often as it takes within `limit` seconds.

    False where that was not wanted any more (it was stopped or detached), or somebody did it.
    Raises HorcruxError, the reason of the last attempt.
    """
    began = time.monotonic()
    before = server.last(name)
    if before is None:
        return False
    pause = delay_of(before.restarts, began - before.began)
    while True:
        time.sleep(pause)
        try:
            serving = revive(name)
        except (HorcruxError, OSError) as error:
            log.error("volume %s: %s", name, error)
            if time.monotonic() - began > limit:
                raise
            pause = min(max(2 * pause, FIRST_DELAY), MOST_DELAY)
            continue
        if serving is None:
            return False
        log.warning(
            "volume %s: its server (process %d) died; process %d goes on after %.1f s, restart %d",
            name,
            before.pid,
            serving.pid,
            time.monotonic() - began,
            serving.restarts,
        )
        return True


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m horcrux_nbd.supervise VOLUME", file=sys.stderr)
        return 2
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    try:
        supervise(sys.argv[1])
    except (HorcruxError, OSError) as error:
        log.error("volume %s stays without a server: %s", sys.argv[1], error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
