"""Several processes want the same thing at the same moment: one gets it, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify

from ..repository.images import CHUNK
from ..servers.answering import answering
from ..servers.moto_s3 import S3Server
from ..servers.nbdkit import MISSING, Nbdkit, available, connected
from ..servers.proxy import Network, proxy
from ..servers.sshd import Sshd
from ..volume.support import make_image, make_volume, noise

PROJECT = Path(__file__).resolve().parents[2]
RACERS = 4
LONG = {"cp": 1000, "scp": 1000, "s3": 1000, "ceph": 1000}
SHORT = {"cp": 100, "scp": 40, "s3": 15}


@dataclass
class Place:
    """A store, and the network to it, if there is one: it may be cut at any moment."""

    url: str
    network: Network | None = None


@contextlib.contextmanager
def place(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    if kind == "cp":
        yield Place(f"cp://{folder}/store")
        return
    if kind == "scp":
        server: Sshd = request.getfixturevalue("ssh")
        with proxy(server.port) as network:
            server.trust(network.port)
            yield Place(server.url(folder / "store", network.port), network)
        return
    s3: S3Server = request.getfixturevalue("s3" if kind == "s3" else "ceph_server")
    if kind == "ceph":
        s3.enter(request.getfixturevalue("monkeypatch"))
    with contextlib.ExitStack() as stack:
        port = s3.port if kind == "ceph" else stack.enter_context(answering(s3.port)).port
        network = stack.enter_context(proxy(port))
        yield Place(s3.url(s3.make_bucket(), "store", network.port), network)


def race(place: Place, races: int) -> None:
    """Every number of the branch has one winner, who knows it, and all their versions are there."""
    with open_store(place.url, create=True) as store:
        Repository.create(store, CHUNK)
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.racer", place.url, f"racer{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        for number in range(RACERS)
    ]
    chance = random.Random(1)
    won: dict[int, str] = {}
    lost = cuts = 0
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for _ in range(races):
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
                racer.stdin.flush()
            cut: threading.Timer | None = None
            if place.network is not None and chance.random() < 0.3:
                cut = threading.Timer(chance.uniform(0, 0.05), place.network.cut)
                cut.start()
                cuts += 1
            for racer in racers:
                assert racer.stdout is not None
                word, *told = racer.stdout.readline().split()
                if word == "lost":
                    lost += 1
                    continue
                number, commit = told
                assert int(number) not in won, "two winners"
                won[int(number)] = commit
            if cut is not None:
                cut.join()
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert len(won) >= races  # in each race somebody wins
    assert lost > races  # and they did meet
    with open_store(place.url) as store:
        repository = Repository.open(store)
        records = list(repository.refs.records("A", "main"))
        assert {r.number: r.commit.hex() for r in records if r.commit} == won
        at: str | None = won[max(won)]
        history = []
        while at is not None:
            history.append(at)
            parents = repository.read_commit(bytes.fromhex(at)).parents
            at = parents[0].hex() if parents else None
        assert history == [won[number] for number in sorted(won, reverse=True)]
        assert verify(store, data=True).ok
    print(f"{races} races, {len(won)} moves, {lost} lost, {cuts} cuts of the network")


@pytest.mark.parametrize("kind", ["cp", "scp", "s3"])
def test_one_winner(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with place(kind, tmp_path, request) as there:
        race(there, SHORT[kind])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["cp", "scp", "s3", "ceph"])
def test_a_thousand_races(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with place(kind, tmp_path, request) as there:
        race(there, LONG[kind])


# ---- one server


@pytest.mark.skipif(not available(), reason=MISSING)
def test_of_many_servers_of_one_volume_one_starts(tmp_path: Path) -> None:
    """All started at the same moment; whoever comes second says who was first."""
    url = make_image(tmp_path / "store", noise(CHUNK))
    folder = make_volume(tmp_path / "v", url)
    for _ in range(3):
        servers = [Nbdkit(volume=folder, cache=tmp_path / "cache") for _ in range(5)]
        said = [""] * len(servers)
        told, over = threading.Semaphore(0), threading.Event()

        def start(number: int, servers=servers, said=said, told=told, over=over) -> None:  # type: ignore[no-untyped-def]
            try:
                servers[number].start()
            except RuntimeError as error:
                said[number] = str(error)
            told.release()
            over.wait(60)  # a server ends with the thread that started it

        threads = [threading.Thread(target=start, args=[n]) for n in range(len(servers))]
        for thread in threads:
            thread.start()
        try:
            for _ in servers:
                assert told.acquire(timeout=60)
            (first,) = (n for n, words in enumerate(said) if not words)
            for number, words in enumerate(said):
                assert number == first or "in use by process" in words
            with connected(servers[first]) as client:
                assert bytes(client.pread(CHUNK, 0)) == noise(CHUNK)
        finally:
            for server in servers:
                server.__exit__(None, None, None)
            over.set()
            for thread in threads:
                thread.join(60)


# ---- removal against pushes

_SCALED = """
import sys, time, random
from horcrux_nbd.repository import removal, sweeps
# A day is six seconds, an hour is two: what the rules allow for is scaled, and nothing else.
sweeps.NOTICE = removal.NOTICE = 6.0
sweeps.MARGIN = removal.MARGIN = 2.0
removal.SLACK = 1.5  # the key of an announcement holds whole seconds
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Busy
from horcrux_nbd.repository.repository import Repository
"""
_PUSHER = (
    _SCALED
    + """
from tests.repository.images import content, make_commit
url, name, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
chance = random.Random(name)
done = refused = 0
with open_store(url) as store:
    repository = Repository.open(store)
    while done < times:
        # The same few chunks again and again: most are there already, and many are condemned.
        chunks = {chance.randrange(4): content(str(chance.randrange(12))) for _ in range(3)}
        try:
            make_commit(repository, chunks, branch=name, size=4 << 16)
            done += 1
            if chance.random() < 0.7:
                head = repository.refs.head("A", name)
                repository.refs.move("A", name, None, head.commit, author="", why="")
        except Busy:
            refused += 1
            time.sleep(0.05)  # paces a loop that would else ask a thousand times
        time.sleep(chance.uniform(0, 0.9))  # pushes take up some time; not a wait for anything
print(done, refused)
"""
)
_REMOVER = (
    _SCALED
    + """
import os
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.retention import Rules
from horcrux_nbd.repository.verify import verify
runs = removed = 0
with open_store(sys.argv[1]) as store:
    repository = Repository.open(store)
    while os.getppid() == int(sys.argv[2]) and not os.path.exists(sys.argv[3]):
        try:
            removed += Collector(repository).run(Rules()).removed_objects
            runs += 1
        except Busy:
            pass
        time.sleep(0.2)
print(runs, removed)
"""
)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_removal_against_two_hundred_pushes(tmp_path: Path) -> None:
    """Processes of their own. In CI, tests/repository/test_removal.py does 200 rounds in one."""
    url, stop = f"cp://{tmp_path}/store", tmp_path / "stop"
    with open_store(url, create=True) as store:
        Repository.create(store, CHUNK)
    command = [sys.executable, "-c"]
    pushers = [
        subprocess.Popen(
            [*command, _PUSHER, url, f"b{number}", "70"],
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
        )
        for number in range(3)
    ]
    removers = [
        subprocess.Popen(
            [*command, _REMOVER, url, str(os.getpid()), str(stop)],
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            text=True,
        )
        for _ in range(2)
    ]
    looks = 0
    try:
        while any(pusher.poll() is None for pusher in pushers):
            with open_store(url) as store:
                report = verify(store, data=True)
                if not report.ok:  # a head that was deleted while we looked is no damage
                    report = verify(store, data=True)
                assert report.ok, report.problems[:3]
            looks += 1
        stop.touch()
        told = [process.communicate(timeout=60)[0] for process in [*pushers, *removers]]
        assert all(process.returncode == 0 for process in [*pushers, *removers])
    finally:
        for process in [*pushers, *removers]:
            process.kill()
            process.communicate()
    figures = [tuple(map(int, line.split())) for line in told]
    pushed = sum(done for done, _ in figures[:3])
    refused = sum(no for _, no in figures[:3])
    removed = sum(gone for _, gone in figures[3:])
    print(f"{pushed} pushes, {refused} refused, {removed} objects removed, {looks} times verified")
    assert pushed >= 200
    assert removed > 50
    with open_store(url) as store:
        assert verify(store, data=True).ok
