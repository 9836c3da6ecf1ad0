"""The units of systemd: sound, in the right order, and a restart keeps what serves volumes.

The last needs systemd as init, which `scripts/vm-docker` has in its VM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, server
from horcrux_nbd.attach.processes import Process
from tests.cli.support import make_directory, run
from tests.servers.process import PATIENCE

from .support import PROGRAM, wait_for

UNITS = Path(__file__).parents[2] / "packaging/systemd"
NAMES = ("horcrux-dv.service", "horcrux-dv.socket")
SYSTEM = Path("/etc/systemd/system")
LIMIT = 60.0 * PATIENCE  # seconds

in_vm = pytest.mark.skipif(
    not os.environ.get("HORCRUX_IN_VM") or not os.path.exists("/run/systemd/system"),
    reason="needs systemd as init of a throw-away machine: scripts/vm-docker",
)


def command(*words: str | Path) -> str:
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def install(folder: Path) -> list[Path]:
    """The units with the program of this test run."""
    made = []
    for name in NAMES:
        text = (UNITS / name).read_text()
        if name.endswith(".service"):
            assert "ExecStart=/opt/horcrux/bin/horcrux-dv " in text
            text = text.replace("/opt/horcrux/bin/horcrux-dv", str(PROGRAM))
        made.append(folder / name)
        made[-1].write_text(text)
    return made


def test_the_units_are_sound(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    done = subprocess.run(
        ["systemd-analyze", "verify", *install(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "horcrux-dv" in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[str]:
    """A repository and the name of a volume, on the host that root's units use."""
    make_directory(tmp_path / "source")
    run("generate", "-q", "--size", "64M", "AMCC", tmp_path / "source", tmp_path / "repository")
    (SYSTEM / "horcrux-dv.service.d").mkdir(exist_ok=True)
    names = ("ROOT", "RUN", "CONFIG")
    lines = [f"Environment=HORCRUX_{name}={os.environ[f'HORCRUX_{name}']}\n" for name in names]
    (SYSTEM / "horcrux-dv.service.d/test.conf").write_text("[Service]\n" + "".join(lines))
    install(SYSTEM)
    command("systemctl", "daemon-reload")
    yield f"cp://{tmp_path}/repository"
    subprocess.run(["systemctl", "stop", "docker", "docker.socket", *NAMES], check=False)


@in_vm
@pytest.mark.timeout(600)
def test_a_restart_keeps_what_serves_volumes(volume: str, tmp_path: Path) -> None:
    before = command("systemctl", "show", "-P", "Before", "horcrux-dv.service")
    assert "docker.service" in before.split()
    command("systemctl", "start", "horcrux-dv.socket")
    command("systemctl", "start", "docker.service")
    # By the socket: nobody has started the service.
    assert subprocess.run(["systemctl", "-q", "is-active", "horcrux-dv"], check=False).returncode
    create = ("docker", "volume", "create", "-d", "horcrux")
    command(*create, "-o", "on-remove=delete", "-o", "name=AMCC", "-o", f"access={volume}", "vol")
    command("systemctl", "-q", "is-active", "horcrux-dv")
    subprocess.run(
        "mkdir -p /tmp/bb/bin && cp /bin/busybox /tmp/bb/bin/sh && tar -C /tmp/bb -c . | "
        "docker import - bb",
        shell=True,
        check=True,
        capture_output=True,
        timeout=LIMIT,
    )
    script = "while echo x >>/data/lines; do sleep 0.2; done; echo failed"
    command("docker", "run", "-d", "--name", "writer", "--network=none", "-v", "vol:/data", "bb",
            "/bin/sh", "-c", script)  # fmt: skip
    serving = server.running("vol")
    assert serving is not None
    group = Path(f"/proc/{serving.pid}/cgroup").read_text()
    assert "horcrux-dv.service" in group
    lines = Path(host.mounts("vol")[0].target) / "lines"

    def goes_on() -> None:
        size = lines.stat().st_size
        wait_for(lambda: lines.stat().st_size > size + 2, "more lines")

    goes_on()
    for words in (
        ("restart", "horcrux-dv"),
        ("kill", "-s", "KILL", "--kill-who=main", "horcrux-dv"),
    ):
        main = command("systemctl", "show", "-P", "MainPID", "horcrux-dv")
        command("systemctl", *words)
        wait_for(
            lambda main=main: (
                command("systemctl", "show", "-P", "MainPID", "horcrux-dv") not in (main, "0")
            ),
            "the next driver",
        )
        goes_on()
        assert Process.of(serving.pid) == serving.process
        assert command("docker", "volume", "ls", "-q") == "vol"
    command("systemctl", "stop", "horcrux-dv.service")
    goes_on()
    assert Process.of(serving.pid) == serving.process
    # Docker's next call starts it again.
    command("docker", "rm", "-f", "writer")
    assert server.running("vol") is None
    command("systemctl", "-q", "is-active", "horcrux-dv")
    command("docker", "volume", "rm", "vol")
    assert Path("/run/horcrux/metrics.sock").is_socket()
