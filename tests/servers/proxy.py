"""A TCP proxy that is a bad network: it delays, limits bandwidth, cuts, stalls and refuses.

In a test:

    with proxy(server_port) as network:
        network.delay = 0.010          # seconds each way: 20 ms of round trip
        network.stall()                # accepts and carries nothing, until resume()
        network.cut()                  # resets every connection there is
        network.cut_after(100_000)     # resets a connection once so much came from the server

As a process of its own (for benchmarks, where a thread would share the GIL with what is measured):

    python -m tests.servers.proxy SERVER_PORT [--port N] [--rtt MS] [--rate MBYTES_PER_S]

It prints its port, and at each SIGUSR1 how many bytes it has carried to the server and to clients.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator

PIECE = 64 << 10
# What is "in the wire" at most for each direction of a connection; like a large TCP window.
IN_FLIGHT = 16 << 20
# Seconds of data that wait before a line that is full, as in a router: then the sender is held up.
BACKLOG = 0.02


class Network:
    """What the proxy does to connections; change it while it runs, from any thread."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0  # seconds each way
        self.rate = 0.0  # bytes per second each way, for all connections together; 0: no limit
        self.accepted = 0  # connections so far
        self.to_server = self.to_client = 0  # bytes so far
        self._free = {True: 0.0, False: 0.0}  # when each way of the line has carried all before
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut_after: int | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._refusing = False
        self._server: asyncio.Server | None = None

    # ---- from tests -----------------------------------------------------------------------------

    def _do(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)  # type: ignore[arg-type]

    def stall(self) -> None:
        """Carry nothing any more; connections stay open, and new ones are accepted."""
        self._do(self._set_flows(False))

    def resume(self) -> None:
        """Carry again, beginning with what was held back."""
        self._do(self._set_flows(True))

    def cut(self) -> None:
        """Reset all connections; new ones are served."""
        self._do(self._cut_all())

    def cut_after(self, count: int | None) -> None:
        """Reset the next connection that has carried `count` bytes from the server, once."""
        self._cut_after = count

    def refuse(self) -> None:
        """Reset all connections, and every new one at once, as when nobody listens."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """End `refuse`."""
        self._refusing = False

    # ---- inside ---------------------------------------------------------------------------------

    async def _set_flows(self, flows: bool) -> None:
        if flows:
            self._flows.set()
        else:
            self._flows.clear()

    async def _cut_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def finish(self) -> None:
        if self._server:
            self._server.close()
        await self._cut_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        try:
            if self._refusing:
                return
            back, other = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
            self._writers.add(other)
            for side in (writer, other):
                side.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(
                self._carry(reader, other, up=True), self._carry(back, writer, up=False)
            )
        except (OSError, asyncio.CancelledError):
            pass  # cut: the resets below are what it looks like to both ends
        finally:
            for end in (writer, other):
                if end is not None:
                    _reset(end)
                    self._writers.discard(end)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        """One direction. Reading and writing are apart, so that a delay costs no bandwidth."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT // PIECE)
        delivering = asyncio.ensure_future(self._deliver(queue, writer, up=up))
        try:
            while True:
                data = await reader.read(PIECE)
                due = await self._line(len(data), up=up) + self.delay
                put = asyncio.ensure_future(queue.put((due, data)))
                await asyncio.wait({put, delivering}, return_when=asyncio.FIRST_COMPLETED)
                if delivering.done():
                    put.cancel()
                    delivering.result()
                    return
                if not data:
                    break
            await delivering
        finally:
            delivering.cancel()

    async def _line(self, count: int, *, up: bool) -> float:
        """When `count` bytes are through this way of the line, which all connections share."""
        if not self.rate:
            return self._loop.time()
        while (wait := self._free[up] - self._loop.time() - BACKLOG) > 0:
            await asyncio.sleep(wait)
        self._free[up] = max(self._free[up], self._loop.time()) + count / self.rate
        return self._free[up]

    async def _deliver(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        carried = 0
        while True:
            due, data = await queue.get()
            if (wait := due - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            await self._flows.wait()
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            if not up and self._cut_after is not None and carried + len(data) > self._cut_after:
                writer.write(data[: self._cut_after - carried])
                self._cut_after = None
                await writer.drain()
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
            carried += len(data)
            if up:
                self.to_server += len(data)
            else:
                self.to_client += len(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End with a reset (linger 0), not with an orderly end of data."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def proxy(target: int, *, delay: float = 0.0, rate: float = 0.0) -> Iterator[Network]:
    """A proxy in a thread of this process, in front of the server on port `target`."""
    network = Network(target)
    network.delay, network.rate = delay, rate
    loop = network._loop
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    network._do(network.start())
    try:
        yield network
    finally:
        network._do(network.finish())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=int, help="port of the server, on 127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="to listen on (default: any)")
    parser.add_argument("--rtt", type=float, default=0, help="milliseconds of round trip")
    parser.add_argument("--rate", type=float, default=0, help="MB/s each way, in all")
    arguments = parser.parse_args()
    network = Network(arguments.target)
    network.delay, network.rate = arguments.rtt / 2000, arguments.rate * 1e6
    loop = network._loop
    loop.run_until_complete(network.start(arguments.port))
    loop.add_signal_handler(
        signal.SIGUSR1, lambda: print(network.to_server, network.to_client, flush=True)
    )
    print(network.port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        loop.run_forever()
    sys.exit(0)


if __name__ == "__main__":
    main()
