"""Volumes: local writable copies of versions, as a disk, a mount or an NBD socket."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from .. import config
from ..errors import HorcruxError, NotFound, UsageError
from ..names import Version, check_name
from ..units import format_size
from . import output, prefetching
from .versions_status import versions_json, versions_line
from .words import VOLUME, existing_folder, volume_state

if TYPE_CHECKING:
    from ..host import VolumeStatus

VIA_HELP = "nbd (kernel NBD), ublk, or fuse (nbdfuse + loop). Default: the best there is."
via_option = click.option("--via", metavar="WAY", help=VIA_HELP)
read_only_option = click.option("-r", "--read-only", is_flag=True, help="Take no writes.")


def _via(asked: str | None) -> str | None:
    return asked or config.load().attach_via


# ---- use


@click.command(options_metavar="[OPTIONS]")
@click.argument("words", nargs=-1, required=True, metavar="VOLUME DIR | NAME ACCESS-URL DIR")
@via_option
@read_only_option
@click.option(
    "-o", "options", multiple=True, metavar="OPTION", help="Mount option, as of mount(8)."
)
@prefetching.fill_options
@output.json_option
def mount(
    words: tuple[str, ...],
    via: str | None,
    read_only: bool,
    options: tuple[str, ...],
    prefetch: str | None,
    fill_rate: int | None,
    record: str | None,
    as_json: bool,
) -> None:
    """Mount a volume on DIR: serve, attach, mount in one go.

    With three words, as the original Horcrux had it: the image NAME of the repository ACCESS-URL,
    in a volume of that name, which is made if it is missing.

    DIR is made if it is missing. Mounts with noatime,nosuid,nodev; -o suid, -o dev, -o atime undo
    that. What is written stays in the volume: mount it again later, after a reboot too.

    \b
    horcrux-cli mount amcc /mnt/amcc
    horcrux-cli mount AMCC scp://me@nas:/srv/images /mnt/amcc
    """
    from .. import host

    if len(words) not in (2, 3):
        raise UsageError("mount takes VOLUME DIR, or NAME ACCESS-URL DIR")
    volume, target = words[0], existing_folder(words[-1])
    made = len(words) == 3 and _make_missing(volume, words[1])
    try:
        mounted = host.mount(
            volume,
            target,
            via=_via(via),
            read_only=read_only,
            mount_options=options,
            options=prefetching.server_options(prefetch, fill_rate, record),
        )
    except BaseException:
        if made:
            host.remove(volume, force=True)
        raise
    if as_json:
        output.emit_json(described(host.status(volume)))
    else:
        mode = ", read-only" if mounted.read_only else ""
        click.echo(f"{volume} is on {mounted.target} ({mounted.source}, {mounted.fstype}{mode})")


def _make_missing(name: str, repo: str) -> bool:
    """Make the volume `name` of the image of that name, unless it is there; whether it was made.

    Raises UsageError where it is there and of something else.
    """
    from .. import host

    check_name("volume", name)
    url = config.load().url(repo)
    state = volume_state(name)
    if state is None:
        host.create(name, url, Version(name))
        return True
    if state.repository != url or state.image != name:
        raise UsageError(
            f"volume {name} is of {state.asked} in {state.repository}, not of {name} in {url}: "
            f"`horcrux-cli create` one of another name, or mount this one with "
            f"`horcrux-cli mount {name} DIR`"
        )
    return False


@click.command()
@click.argument("volume", type=VOLUME, metavar="VOLUME|DIR")
@click.option("-f", "--force", is_flag=True, help="Take it away from who uses it; writes may fail.")
def umount(volume: str, force: bool) -> None:
    """Unmount a volume, detach it and stop its server.

    VOLUME may be the folder that it is mounted on. Everything that was written is safe on disk
    then. Refuses while somebody uses it, and says who.

    \b
    horcrux-cli umount amcc
    horcrux-cli umount /mnt/amcc
    """
    from .. import host

    if "/" not in volume and volume_state_of(volume) is None and os.path.isdir(volume):
        volume = os.path.abspath(volume)
    click.echo(f"{host.umount(volume, force=force)} is unmounted")


def volume_state_of(name: str) -> Any:
    """As `volume_state`, None also for what cannot name a volume (`.`)."""
    try:
        return volume_state(name)
    except UsageError:
        return None


@click.command()
@click.argument("volume", type=VOLUME)
@via_option
@read_only_option
@prefetching.fill_options
@output.json_option
def attach(
    volume: str,
    via: str | None,
    read_only: bool,
    prefetch: str | None,
    fill_rate: int | None,
    record: str | None,
    as_json: bool,
) -> None:
    """Make a volume a block device of this host.

    Serves it with nbdkit and prints the device.

    \b
    horcrux-cli attach amcc          # then: fsck -n, dd, mount, …
    horcrux-cli attach amcc --via fuse
    """
    from .. import host

    options = prefetching.server_options(prefetch, fill_rate, record)
    attachment = host.attach(volume, via=_via(via), read_only=read_only, options=options)
    if as_json:
        output.emit_json(described(host.status(volume)))
    else:
        click.echo(attachment.device)


@click.command()
@click.argument("volume", type=VOLUME)
@click.option("-f", "--force", is_flag=True, help="Take it away from who uses it; writes may fail.")
def detach(volume: str, force: bool) -> None:
    """Release a volume's device and stop its server.

    Also ends `serve`. Refuses while it is mounted or open, and says by whom. Cleans up what a crash
    left.

    \b
    horcrux-cli detach amcc
    """
    from .. import host, server

    was_served = server.running(volume) is not None
    was_attached = host.detach(volume, force=force)
    if not was_attached and not was_served:
        raise NotFound(f"volume {volume} is neither attached nor served")
    click.echo(f"{volume} is {'detached' if was_attached else 'not served any more'}")


@click.command()
@click.argument("volume", type=VOLUME)
@click.option("--socket", type=click.Path(), help="Listen there. Default: below the state folder.")
@click.option("--foreground", is_flag=True, help="Stay, and stop serving on Ctrl-C or SIGTERM.")
@click.option("--tcp", metavar="[HOST:]PORT", help="Over TCP too. HOST: default 127.0.0.1.")
@click.option(
    "--tls",
    type=click.Path(file_okay=False),
    help="With --tcp: folder with ca-cert.pem, server-cert.pem, server-key.pem.",
)
@click.option("--any-client", is_flag=True, help="With --tls: clients need no certificate.")
@click.option("--plain", is_flag=True, help="With --tcp: no TLS; that network reads and writes.")
@read_only_option
@prefetching.fill_options
@output.json_option
def serve(
    volume: str,
    socket: str | None,
    foreground: bool,
    tcp: str | None,
    tls: str | None,
    any_client: bool,
    plain: bool,
    read_only: bool,
    prefetch: str | None,
    fill_rate: int | None,
    record: str | None,
    as_json: bool,
) -> None:
    """Serve a volume on a socket, for VMs and NBD tools.

    Prints its NBD URI. Needs no root. `horcrux-cli detach VOLUME` ends it.

    \b
    horcrux-cli serve amcc
    qemu-img info "$(horcrux-cli serve amcc)"
    qemu-system-x86_64 -drive file='nbd+unix:///?socket=/run/horcrux/amcc/nbd.sock'

    Other machines get in with --tcp and TLS: those whose certificate the same authority signed.

    \b
    horcrux-cli serve amcc --tcp 0.0.0.0:10809 --tls /etc/pki/nbdkit
    """
    from .. import host
    from .. import tcp as over_tcp

    if tcp is None and (tls or any_client or plain):
        raise UsageError("--tls, --any-client and --plain go with --tcp")
    address = None if tcp is None else over_tcp.parse(tcp)
    if address is not None and plain == (tls is not None):
        raise UsageError(over_tcp.CHOOSE)
    if tls is not None:
        over_tcp.check_certificates(Path(tls))
    served = host.serve(
        volume,
        socket=Path(os.path.abspath(socket)) if socket else None,
        read_only=read_only,
        options=prefetching.server_options(prefetch, fill_rate, record),
    )
    uri = nbd_uri(served.socket)
    if address is not None:
        try:
            uri = over_tcp.serve(
                volume,
                served,
                address,
                Path(tls) if tls else None,
                any_client=any_client,
                plain=plain,
            ).uri
        except BaseException:
            host.stop(volume)
            raise
    if as_json:
        output.emit_json({"pid": served.pid, "socket": str(served.socket), "uri": uri})
    else:
        click.echo(uri)
    if foreground:
        _stay(volume, served.pid)


def nbd_uri(socket: Path) -> str:
    """As qemu and libnbd take it (the NBD URI specification)."""
    return f"nbd+unix:///?socket={quote(str(socket))}"


def _stay(volume: str, pid: int) -> None:
    """Until the server ends; whatever ends us ends it as well, after its last flush."""
    from .. import host

    try:
        fd = os.pidfd_open(pid)
        try:
            select.select([fd], [], [])
        finally:
            os.close(fd)
    except BaseException:
        host.stop(volume)
        raise
    raise HorcruxError(f"the server of {volume} ended by itself: see its log (horcrux-cli status)")


# ---- status


@click.command()
@click.argument("volume", required=False, type=VOLUME)
@output.json_option
def status(volume: str | None, as_json: bool) -> None:
    """Show volumes: cached, changed, attached where.

    CACHED is how much of the version is on this host already, CHANGED what was written over it,
    FETCHED what the running server got from the repository.

    \b
    horcrux-cli status
    horcrux-cli status amcc --json
    """
    from .. import host

    found = [host.status(volume)] if volume else host.statuses()
    if as_json:
        values = [described(one) for one in found]
        output.emit_json(values[0] if volume else values)
        return
    if volume:
        output.facts(_facts(found[0]))
        return
    if not found:
        click.echo("there is no volume yet: horcrux-cli create VOLUME REPO VERSION", err=True)
        return
    output.table(
        ("VOLUME", "VERSION", "SIZE", "CACHED", "CHANGED", "FETCHED", "DEVICE", "MOUNTED ON"),
        [_cells(one) for one in found],
        right=("SIZE", "CACHED", "CHANGED", "FETCHED"),
    )
    for one in found:
        if one.problem:
            click.echo(f"{one.name}: {output.printable(one.problem)}")


def _size(value: int | None) -> str:
    return "?" if value is None else format_size(value)


def _cached(cached: int | None, data: int | None) -> str:
    if cached is None:
        return "?"  # too large to count in passing
    of = "" if data is None else f" of {format_size(data)} of data"
    return format_size(cached) + of


def _fetched(one: VolumeStatus) -> int | None:
    return None if one.figures is None else int(one.figures["fetched_bytes"])


def _where(one: VolumeStatus) -> str:
    if one.attachment is not None:
        return one.attachment.device
    return "served" if one.server is not None else ""


def _cells(one: VolumeStatus) -> tuple[str, ...]:
    fetched = _fetched(one)
    return (
        one.name,
        f"{one.state.asked} {output.short(one.state.base)}",
        format_size(one.state.size),
        _size(one.survey.cached),
        format_size(one.survey.written + one.survey.zeroed),
        "" if fetched is None else format_size(fetched),
        _where(one),
        ", ".join(mount.target for mount in one.mounts),
    )


def _facts(one: VolumeStatus) -> list[tuple[str, str]]:
    state, survey, fetched = one.state, one.survey, _fetched(one)
    pairs = [
        ("volume", one.name + (" (read-only)" if state.read_only else "")),
        ("version", f"{state.asked} {output.short(state.base)}"),
        ("repository", state.repository),
        ("created", output.when(state.created)),
        ("size", format_size(state.size)),
        ("cached", _cached(survey.cached, survey.data)),
        (
            "changed",
            f"{format_size(survey.written)} written, {format_size(survey.zeroed)} zeroed; "
            f"{format_size(survey.disk)} on disk",
        ),
        ("versions", versions_line(one.name)),
        ("fetched", "" if fetched is None else f"{format_size(fetched)} since it is served"),
        ("prefetch", prefetching.line(one)),
        ("server", f"process {one.server.pid}, {nbd_uri(one.server.socket)}" if one.server else ""),
        ("device", f"{one.attachment.device} (via {one.attachment.via})" if one.attachment else ""),
        ("mounted on", ", ".join(mount.target for mount in one.mounts)),
        ("problem", one.problem),
    ]
    return [(what, value) for what, value in pairs if value]


def described(one: VolumeStatus) -> dict[str, Any]:
    state, survey = one.state, one.survey
    server, attachment = one.server, one.attachment
    return {
        "name": one.name,
        **versions_json(one.name),
        "repository": state.repository,
        "image": state.image,
        "ref": state.ref,
        "base": state.base,
        "size": state.size,
        "chunk_size": state.chunk_size,
        "read_only": state.read_only,
        "created": state.created,
        "data_bytes": survey.data,
        "cached_bytes": survey.cached,
        "written_bytes": survey.written,
        "zeroed_bytes": survey.zeroed,
        "disk_bytes": survey.disk,
        "fetched_bytes": _fetched(one),
        "prefetch": state.fill.mode,
        "fill_rate": state.fill.rate,
        "record": state.fill.record,
        "prefetch_progress": (one.figures or {}).get("prefetch"),
        "server": server
        and {
            "pid": server.pid,
            "socket": str(server.socket),
            "uri": nbd_uri(server.socket),
        },
        "attached": attachment and {"device": attachment.device, "via": attachment.via},
        "mounted": [mount.target for mount in one.mounts],
        "problem": one.problem or None,
    }
