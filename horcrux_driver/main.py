"""`horcrux-dv`: the Docker volume driver."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import click

from horcrux_nbd import __version__, config, files, paths
from horcrux_nbd.errors import EnvironmentProblem, HorcruxError, UsageError

from . import logs

PROGRAM = logs.PROGRAM
SOCKET = "/run/docker/plugins/horcrux.sock"
EVERY = 30.0  # seconds between two looks at what is really there
GRACE = 60.0  # seconds after a mount in which its container may not run yet
IDLE = 10.0  # seconds; Docker leaves a connection open for each volume that it used
FILE = click.Path(path_type=Path)
TAKE_OVER = 15.0  # seconds that the driver before this one has to end


@click.command(PROGRAM, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    default=SOCKET,
    show_default=True,
    type=click.Path(path_type=Path),
    help="Listen there. Its name is the driver's: horcrux.sock is `-d horcrux`.",
)
@click.option(
    "--listen",
    "address",
    metavar="ADDRESS:PORT",
    help="Listen there instead, for a .spec or .json file in /etc/docker/plugins.",
)
@click.option("--tls-cert", type=FILE, help="With --listen: the driver's certificate, …")
@click.option("--tls-key", type=FILE, help="… its key, …")
@click.option("--tls-ca", type=FILE, help="… and who has to have signed Docker's certificate.")
@click.option(
    "--docker-host",
    metavar="URL",
    help="Ask this Docker which containers run. Default: $DOCKER_HOST, or its usual socket.",
)
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    metavar="LEVEL",
    help="debug, info, warning or error. SIGUSR1 makes it one step more, SIGUSR2 one less.",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Serve figures for Prometheus there, at /metrics: the path of a Unix socket, or "
    "ADDRESS:PORT.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def command(
    socket: Path,
    address: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    docker_host: str | None,
    log_level: str,
    log_json: bool,
    metrics: str | None,
) -> None:
    """The Docker volume driver of Horcrux: serves until it is told to end.

    Servers and mounts of volumes go on without it; the next one takes them over.

    \b
    horcrux-dv &
    docker volume create -d horcrux -o name=AMCC -o access=scp://me@nas:/srv/images v1
    docker run -v v1:/data …
    """
    for package in ("aiohttp", "docker", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise EnvironmentProblem(
                f"the Python package {package} is missing: pip install 'horcrux-nbd[driver]'"
            )
    if os.geteuid() != 0:
        raise EnvironmentProblem("horcrux-dv attaches and mounts volumes, which needs root")
    logs.set_up(log_level, as_json=log_json)
    os.environ.update(config.load().environment())  # what is wrong with it is told now
    files.make_folder(paths.run(), 0o700)
    context = _context(address, tls_cert, tls_key, tls_ca)
    lock = files.FileLock(paths.run() / "driver.lock", PROGRAM)
    lock.acquire(TAKE_OVER)
    try:
        asyncio.run(_serve(address or os.path.abspath(socket), context, docker_host, metrics))
    finally:
        lock.release()


def _context(address: str | None, *tls: Path | None) -> ssl.SSLContext | None:
    from . import listen

    if address is not None:
        return listen.secured(address, *tls)
    if any(tls):
        raise UsageError("--tls-cert, --tls-key and --tls-ca are for --listen ADDRESS:PORT")
    return None


async def _serve(
    address: str,
    context: ssl.SSLContext | None,
    docker_host: str | None,
    figures_at: str | None,
) -> None:
    from aiohttp import web

    from . import listen
    from .driver import Driver
    from .engine import Engine
    from .metrics import Metrics
    from .protocol import SHUTDOWN_LIMIT, Protocol

    log = logging.getLogger(PROGRAM)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    logs.follow_signals(asyncio.get_running_loop())
    driver, figures = Driver(Engine(docker_host)), Metrics()
    due, ended = threading.Event(), threading.Event()
    protocol = Protocol(driver, activated=due.set, called=figures.called)
    looking = threading.Thread(target=_look, args=(driver, due, ended), daemon=True)
    runner = web.AppRunner(
        protocol.application(),
        handler_cancellation=True,  # a client that hung up
        shutdown_timeout=SHUTDOWN_LIMIT,
        keepalive_timeout=IDLE,
        access_log=None,
    )
    await runner.setup()
    sockets = listen.inherited()
    for one in sockets:
        await web.SockSite(runner, one).start()
    if not sockets:
        await listen.site(runner, address, context)
    scraped = web.AppRunner(figures.application(), access_log=None)
    if figures_at is not None:
        await scraped.setup()
        await listen.site(scraped, figures_at)
    looking.start()
    log.info("%s %s listens on %s", PROGRAM, __version__, address)
    await told.wait()
    log.info("ending; volumes stay as they are")
    if not sockets and address.startswith("/"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
    await scraped.cleanup()
    await runner.cleanup()
    ended.set()
    due.set()
    await protocol.close()


def _look(driver: object, due: threading.Event, ended: threading.Event) -> None:
    """Compare what is there with what Docker wants: now, every while, and when Docker is new."""
    from .driver import Driver

    assert isinstance(driver, Driver)
    while not ended.is_set():
        due.clear()
        try:
            driver.reconcile(GRACE)
        except Exception:  # the next one may do better
            logging.getLogger(PROGRAM).exception("looking at the volumes")
        due.wait(EVERY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code (errors.py)."""
    try:
        command.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (HorcruxError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130
    return 0
