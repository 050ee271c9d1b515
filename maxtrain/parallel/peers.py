"""The other processes of a run: word of it when one of them ends before its work is done.

JAX does not tell in time: collectives of accelerators wait for ever, missed heartbeats are noticed after minutes, and when
process 0 dies its client aborts the others. So every process keeps a connection to process 0 for as long as it lives. The
kernel of a process that dies, however it dies, closes its connections; a host that is gone does not answer the kernel's
probes. A process that merely stands still for a while is not missed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

PEER_LOST = 76
"""Exit code: another process was lost, and the same command goes on from the last checkpoint."""
DONE, FAILED, STOPPED, LOST = b"d", b"f", b"s", b"l"
"""The last word of a process: it is done; it failed; a signal stopped it before its first step; it has lost another one."""
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds until a silent connection is probed and between probes, and how many are sent."""
PROBE_SECONDS = 20  # after which a host that is gone has been noticed
JOIN_SECONDS = 300  # that processes wait for each other at the start
MEET_SECONDS = 7200  # and later on, where one may compile what others find in a cache; the end of one is told at once
GRACE_SECONDS = 3  # in which processes that fail for the same reason all fail by themselves

_joined = itertools.count()


def leave(code: int, message: str) -> NoReturn:
    """End this process now, from any thread, whatever the others do. Every sink writes its rows out at once, so none is lost."""
    os.write(2, f"{message}\n".encode())
    os._exit(code)


def leave_after(error: BaseException) -> None:
    """End this process with the code that `error` means if others may still wait for it; JAX would wait for them on the way out."""
    import jax

    code = error.code if isinstance(error, SystemExit) else 1
    if not jax.distributed.is_initialized() or code not in (1, 2):
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def join(on_end: Callable[[bytes], object]) -> Peers | None:
    """Connect this process with the others of `jax.distributed`; None if there are none. `on_end`: see `Peers`."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax._src.distributed import global_state  # its store of texts has no public name

    client, address, name = global_state.client, global_state.coordinator_address, f"maxtrain/peers/{next(_joined)}"
    assert client is not None
    assert address is not None
    host = address.rsplit(":", 1)[0].strip("[]")
    if jax.process_index():
        port, token = client.blocking_key_value_get(name, JOIN_SECONDS * 1000).split()
        _delay_abort()
        return Peers([connect(host, int(port), token)], on_end, client)
    with listen() as server:
        token = secrets.token_hex(16)
        client.key_value_set(name, f"{server.getsockname()[1]} {token}")
        return Peers(accept(server, token, jax.process_count() - 1), on_end, client)


class Peers:
    """Connections between process 0 and all others.

    Args:
        connections: in process 0 one to each other process, in the others the one to process 0.
        on_end: called in a thread of its own with the last word of the first process that ends before its work is done,
            empty if it had none. The others have been told by then.
        client: JAX's, for `meet`.
    """

    def __init__(self, connections: list[socket.socket], on_end: Callable[[bytes], object], client: Any = None) -> None:
        self._connections, self._on_end, self._client, self._closed = connections, on_end, client, False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peers")
        self._thread.start()

    def meet(self, place: str) -> None:
        """Return when all processes have come to the place, which is named once in a run. Collectives wait for 30 s only."""
        self._client.wait_at_barrier(f"maxtrain/{place}/{next(_joined)}", 1000 * MEET_SECONDS)

    def close(self, word: bytes, wait: float = 0.0) -> None:
        """Tell the others why this process ends, and wait so many seconds at most for their last words. From any thread."""
        if not self._closed:
            self._closed = True
            for connection in self._connections:
                try:
                    connection.sendall(word)
                except OSError:  # it has gone already
                    continue
        if wait:
            self._thread.join(wait)

    def _watch(self) -> None:
        ended, until = None, None
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map() and (until is None or time.monotonic() < until):
                for key, _ in selector.select(None if until is None else 0.1):
                    selector.unregister(key.fileobj)
                    word = _last_word(key.fileobj)  # type: ignore[arg-type]
                    if word == FAILED:
                        time.sleep(GRACE_SECONDS)
                    if word != DONE and not self._closed:
                        self.close(STOPPED if word == STOPPED else LOST)
                        ended, until = word, time.monotonic() + 1.0  # the end of process 0 aborts the others: after them
        if ended is not None:
            self._on_end(ended)


def listen() -> socket.socket:
    """A socket of process 0 that the others can connect to, at a port that the system chooses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def connect(host: str, port: int, token: str) -> socket.socket:
    """The connection of another process to process 0; `token` shows that it belongs to the run."""
    connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
    connection.sendall(token.encode())
    return _probed(connection)


def accept(server: socket.socket, token: str, count: int) -> list[socket.socket]:
    """The connections of the `count` others to process 0; strangers are sent away.

    Raises:
        TimeoutError: not all came in time.
    """
    found: list[socket.socket] = []
    deadline = time.monotonic() + JOIN_SECONDS
    while len(found) < count:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(10)
        try:
            said = connection.recv(len(token), socket.MSG_WAITALL)
        except OSError:
            said = b""
        if secrets.compare_digest(said, token.encode()):
            found.append(_probed(connection))
        else:
            connection.close()
    return found


def _delay_abort() -> None:
    """Let `abort` take 6 s: JAX's client calls it at once when process 0 is lost, and would be before our own word of that.

    The handler is C's `sleep`, which takes the number of the signal, 6, for seconds; then the process aborts as it would have.
    """
    if threading.current_thread() is threading.main_thread() and os.name == "posix":
        libc = ctypes.CDLL(None)
        libc.signal(int(signal.SIGABRT), libc.sleep)


def _probed(connection: socket.socket) -> socket.socket:
    """The connection, over which the kernel asks from time to time whether the other host is still there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _last_word(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except OSError:
        return b""
