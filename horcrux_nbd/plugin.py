"""The nbdkit plugin: configuration and callbacks, nothing else.

    nbdkit python "$(horcrux-cli plugin-path)" repo=URL name=IMAGE [ref=REF] overlay=FOLDER

nbdkit embeds Debian's Python, so this file finds the packages of the environment it is installed
in by itself (see `_find_packages`), and stays importable outside of nbdkit for the tests.
"""

import errno
import os
import sys

import nbdkit

API_VERSION = 2


def _find_packages():
    """Put our own packages first and Debian's away: an old pyOpenSSL beside a new cryptography
    kills boto3, and /usr/lib/python3/dist-packages is on nbdkit's path.
    """
    folder = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    venv = os.path.join(folder, ".venv", "lib", version, "site-packages")  # a source tree
    sys.path[:] = [entry for entry in sys.path if "dist-packages" not in entry]
    sys.path[:0] = [folder] + ([venv] if os.path.isdir(venv) else [])


_find_packages()
try:
    from horcrux_nbd import serving
except ImportError as error:
    raise SystemExit(
        f"horcrux: nbdkit's Python {sys.version.split()[0]} cannot load Horcrux's packages "
        f"({error}): install horcrux-nbd into a virtual environment that was made with this Python "
        "(/usr/bin/python3 -m venv), and take the plugin's path from its `horcrux-cli plugin-path`"
    ) from None

serving.tell_in_one_line()
server = serving.Server()


def dump_plugin():
    print(f"horcrux_version={serving.__version__}")
    print(f"horcrux_keys={' '.join(serving.KEYS)}")


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key, value):
    server.configure(key, value)


def config_complete():
    server.configured()


def get_ready():
    server.prepare()


def after_fork():
    server.start()


def cleanup():  # nbdkit calls no `unload` of a script, and this when all clients are gone
    server.stop()


def list_exports(readonly, is_tls):
    server.admit()
    return [(server.export, server.description)]


def default_export(readonly, is_tls):
    server.admit()
    return server.export


def open(readonly):
    server.admit()
    return server.connect(nbdkit.export_name())


def export_description(h):
    return server.description


def get_size(h):
    return h.size


def block_size(h):
    return serving.BLOCK_SIZES


def can_write(h):
    return not h.read_only


def can_flush(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_trim(h):
    return not h.read_only


def can_zero(h):
    return not h.read_only


def can_fast_zero(h):
    return not h.read_only


def can_extents(h):
    return True


def can_cache(h):
    return nbdkit.CACHE_NATIVE


def can_multi_conn(h):
    return True  # one volume behind all connections: a flush on any covers the writes of all


def is_rotational(h):
    return False


def _reported(call):
    """Let nbdkit report the errno that an error stands for. Always raises on failure: a read that
    sets an error and returns would succeed with the bytes of the read before (PEERS.md).
    """

    def callback(*args):
        try:
            return call(*args)
        except Exception as error:
            nbdkit.set_error(serving.errno_of(error))
            serving.log.debug("%s failed", call.__name__, exc_info=True)
            raise

    return callback


@_reported
def pread(h, buf, offset, flags):
    h.read_into(offset, buf)


@_reported
def pwrite(h, buf, offset, flags):
    h.write(offset, buf)
    if flags & nbdkit.FLAG_FUA:
        h.flush()


@_reported
def flush(h, flags):
    h.flush()


@_reported
def trim(h, count, offset, flags):
    # To the byte, which NBD does not ask for: a loop device over nbdfuse makes a trim of a request
    # to write zeros (tests/attach/test_zeroes.py).
    h.zero(offset, count)
    if flags & nbdkit.FLAG_FUA:
        h.flush()


@_reported
def zero(h, count, offset, flags):
    if flags & nbdkit.FLAG_FAST_ZERO and not h.zero_is_fast(offset, count):
        nbdkit.set_error(errno.EOPNOTSUPP)  # nbdkit looks at it first: no failure, and no log line
        return
    h.zero(offset, count)
    if flags & nbdkit.FLAG_FUA:
        h.flush()


@_reported
def extents(h, count, offset, flags):
    return serving.extents(h, offset, count, bool(flags & nbdkit.FLAG_REQ_ONE))


@_reported
def cache(h, count, offset, flags):
    h.prefetch(offset, count)
