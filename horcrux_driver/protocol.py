"""Docker's VolumeDriver protocol over HTTP (docs.docker.com/engine/extend/plugins_volume/).

One event loop answers; what blocks runs in threads. Questions have threads of their own, so that
they are answered at once however many volumes wait for their repositories.

aiohttp, because it serves Unix sockets, inherited sockets and TLS alike, and ends a handler when
its client has hung up: that is how a Mount that nobody waits for any more is undone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from aiohttp import web

from horcrux_nbd.errors import HorcruxError, UsageError

from .driver import Driver

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/vnd.docker.plugins.v{}+json"
NEWEST = "1.2"  # what Docker has asked for since 1.12; older ones asked for 1, 1.1
_MEDIA = re.compile(r"application/vnd\.docker\.plugins\.v(\d+(?:\.\d+)?)\+json")
MAX_BODY = 1 << 20  # bytes of a request
QUESTION_LIMIT = 25.0  # seconds; Docker gives questions one minute
# Docker gives Create and Mount two minutes. A managed plugin has what `docker plugin enable
# --timeout` said, 30 s by default, and hangs up then.
WORK_LIMIT = 100.0
UNMOUNT_LIMIT = 50.0  # seconds; Docker gives one minute
QUESTIONS, WORK = 16, 256  # threads
SHUTDOWN_LIMIT = 60.0  # seconds for requests under way, when the driver is told to end

_PROBLEM, _BODY = "horcrux.problem", "horcrux.body"  # of a request, for its log line

Body = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Protocol:
    """The HTTP side of a `Driver`."""

    def __init__(
        self,
        driver: Driver,
        *,
        work_limit: float = WORK_LIMIT,
        activated: Callable[[], None] = lambda: None,
        called: Callable[[str, float, bool], None] = lambda call, seconds, ok: None,
    ) -> None:
        """`activated` is called when a Docker begins to use the driver, `called` after each call:
        its name, the seconds that it took, whether it went well.
        """
        self.driver, self._work_limit, self._activated = driver, work_limit, activated
        self._called = called
        self._questions = ThreadPoolExecutor(QUESTIONS, "question")
        self._work = ThreadPoolExecutor(WORK, "work")

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._observed, _errors])
        for path, handler in {
            "/Plugin.Activate": self._activate,
            "/VolumeDriver.Capabilities": self._capabilities,
            "/VolumeDriver.Create": self._create,
            "/VolumeDriver.Remove": self._remove,
            "/VolumeDriver.Mount": self._mount,
            "/VolumeDriver.Unmount": self._unmount,
            "/VolumeDriver.Path": self._path,
            "/VolumeDriver.Get": self._get,
            "/VolumeDriver.List": self._list,
        }.items():
            app.router.add_post(path, handler)
        return app

    @web.middleware
    async def _observed(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        problem = "nobody waited for the answer"
        try:
            response = await handler(request)
            problem = request.get(_PROBLEM, "")
            return response
        finally:
            seconds = time.monotonic() - began
            call = request.path.rpartition(".")[2]
            if request.match_info.http_exception is None:
                self._called(call, seconds, not problem)
            body = request.get(_BODY, {})
            facts = {"call": call, "volume": body.get("Name"), "mount_id": body.get("ID")}
            log.log(
                logging.INFO if problem else logging.DEBUG,
                "%s %s: %s",
                call,
                facts["volume"] or "",
                problem or f"{seconds * 1000:.1f} ms",
                extra={
                    **{key: one for key, one in facts.items() if one},
                    "seconds": round(seconds, 4),
                    **({"problem": problem} if problem else {}),
                },
            )

    async def close(self) -> None:
        """Wait for what is under way: also what nobody waits for any more has to be undone."""
        await asyncio.get_running_loop().run_in_executor(None, self._work.shutdown)
        self._questions.shutdown(wait=False, cancel_futures=True)

    # ---- endpoints

    async def _activate(self, request: web.Request) -> web.StreamResponse:
        self._activated()
        return _answer(request, {"Implements": ["VolumeDriver"]})

    async def _capabilities(self, request: web.Request) -> web.StreamResponse:
        return _answer(request, {"Capabilities": self.driver.capabilities()})

    async def _get(self, request: web.Request) -> web.StreamResponse:
        name = _name(await _body(request))
        return _answer(request, {"Volume": await self._ask(self.driver.get, name)})

    async def _list(self, request: web.Request) -> web.StreamResponse:
        return _answer(request, {"Volumes": await self._ask(self.driver.list)})

    async def _path(self, request: web.Request) -> web.StreamResponse:
        name = _name(await _body(request))
        return _answer(request, {"Mountpoint": await self._ask(self.driver.path, name)})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        given = body.get("Opts")
        if given is not None and not isinstance(given, dict):
            raise UsageError("Opts is no object")
        await self._do(self._work_limit, self.driver.create, _name(body), given)
        return _answer(request, {})

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        await self._do(UNMOUNT_LIMIT, self.driver.remove, _name(await _body(request)))
        return _answer(request, {})

    async def _unmount(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        await self._do(UNMOUNT_LIMIT, self.driver.unmount, _name(body), _mount_id(body))
        return _answer(request, {})

    async def _mount(self, request: web.Request) -> web.StreamResponse:
        """Undone where the answer does not reach Docker: after a Mount that failed, no Unmount
        comes.
        """
        body = await _body(request)
        name, mount_id = _name(body), _mount_id(body)
        mounting = _Mounting(self.driver, name, mount_id)
        work = self._work.submit(mounting.run)
        try:
            where = await self._wait(work, self._work_limit, f"mounting volume {name}")
            response = _answer(request, {"Mountpoint": where})
            await response.prepare(request)
            await response.write_eof()
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError
        except BaseException:
            if not work.cancel() and mounting.abandon():
                self._work.submit(mounting.undo)
            raise
        return response

    # ---- threads

    async def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        work = self._questions.submit(question, *arguments)
        return await self._wait(work, QUESTION_LIMIT, "the answer")

    async def _do(self, limit: float, work: Callable[..., Any], *arguments: Any) -> Any:
        what = f"{work.__name__} of volume {arguments[0]}"
        return await self._wait(self._work.submit(work, *arguments), limit, what)

    async def _wait(self, work: Future[Any], limit: float, what: str) -> Any:
        """The result of `work`, which goes on where the client hangs up or `limit` has passed."""
        waited = asyncio.wrap_future(work)
        try:
            async with asyncio.timeout(limit):
                return await asyncio.shield(waited)
        except TimeoutError:
            raise HorcruxError(
                f"{what} takes longer than {limit:.0f} s: see the log of horcrux-dv, try again"
            ) from None
        finally:
            # Whatever it raises is told by then, or nobody wants to know.
            waited.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Mounting:
    """A mount that may not be wanted any more when it is done."""

    def __init__(self, driver: Driver, name: str, mount_id: str) -> None:
        self._driver, self._name, self._id = driver, name, mount_id
        self._lock = threading.Lock()
        self._mounted = self._abandoned = False

    def run(self) -> str:
        """In a thread; undoes it there if it was abandoned meanwhile."""
        where = self._driver.mount(self._name, self._id)
        with self._lock:
            self._mounted, abandoned = True, self._abandoned
        if abandoned:
            self.undo()
        return where

    def abandon(self) -> bool:
        """Nobody waits for it. Whether it is mounted already, and the caller has to undo it."""
        with self._lock:
            self._abandoned = True
            return self._mounted

    def undo(self) -> None:
        log.warning("volume %s: nobody waits for this mount any more: undone", self._name)
        try:
            self._driver.unmount(self._name, self._id)
        except (HorcruxError, OSError) as error:
            log.warning("volume %s: %s", self._name, error)


# ---- requests and answers


async def _body(request: web.Request) -> Body:
    """The request's JSON object; empty for an empty body, which Docker's retries may have."""
    data = await request.read()
    if not data.strip():
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # the latter for what is nested too deep
        raise UsageError("the request is no JSON") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError("the request is no JSON object")
    request[_BODY] = value
    return value


def _name(body: Body) -> str:
    name = body.get("Name")
    if not isinstance(name, str) or not name:
        raise UsageError("the request names no volume")
    return name


def _mount_id(body: Body) -> str:
    """Empty from a Docker before 1.12, which has no mount IDs: all its mounts count as one."""
    mount_id = body.get("ID")
    return mount_id if isinstance(mount_id, str) else ""


def _answer(request: web.Request, value: Body) -> web.Response:
    """`value` in the version of the media type that was asked for."""
    asked = _MEDIA.search(request.headers.get("Accept", ""))
    media = MEDIA_TYPE.format(asked.group(1) if asked else NEWEST)
    return web.Response(body=json.dumps(value).encode() + b"\n", headers={"Content-Type": media})


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An error as `Err`, which Docker shows to its user."""
    if "Origin" in request.headers:  # a web page, over TCP: no program of Docker sends that
        return web.Response(status=403, text="no browsers\n")
    try:
        return await handler(request)
    except (HorcruxError, OSError) as error:
        if isinstance(error, ConnectionError):
            raise
        request[_PROBLEM] = str(error)
        return _answer(request, {"Err": str(error)})
    except web.HTTPException as error:
        request[_PROBLEM] = error.reason
        answer = _answer(request, {"Err": error.reason})
        answer.set_status(error.status)
        return answer
    except Exception as error:  # a bug of ours must not become an empty answer
        log.exception("%s", request.path)
        request[_PROBLEM] = repr(error)
        return _answer(request, {"Err": f"horcrux-dv failed: {error!r}"})
