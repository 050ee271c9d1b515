"""The thread that steps an engine while there is work, and that everybody else's threads hand their work to."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.serving.engine import Engine
from maxtrain.serving.scheduler import Request

Listener = Callable[[Request | BaseException], None]
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Action:
    """What is to be run between two steps, and who is told if it fails or is never run."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]


class Driver:
    """The thread that steps an engine, there while there is work. Everything that touches the engine runs in it, in order of arrival.

    A request or a listener that fails ends alone. When the engine itself has ended, everybody who waits is told, and whoever comes
    later is refused with the cause.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # `put` is the one way of handing something over that a garbage collection within another `put` cannot block
        self._inbox: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._cause: BaseException | None = None
        self._listeners: dict[Request, Listener] = {}

    @property
    def is_mine(self) -> bool:
        """Whether the caller runs in the engine's thread, as listeners do."""
        return threading.current_thread() is self._thread

    def do(self, action: Callable[[], Any]) -> Any:
        """Run `action` between two steps, at once if this is the engine's thread; its result.

        Raises:
            Refused: the engine has ended.
        """
        if self.is_mine:
            return action()
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.post(lambda: done.put((action(), None)), lambda error: done.put((None, error)))
        result, error = done.get()
        if error is not None:
            raise error
        return result

    def post(self, action: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        """`do` without waiting; `fail` is called in the engine's thread with what the action raised, or with what ended the engine."""
        self._inbox.put(Action(action, fail))
        self._wake()

    def listen(self, request: Request, listener: Listener) -> None:
        """Call `listener` in the engine's thread whenever the request has news, or with the error that ended the engine.

        To be called in the engine's thread; the listener must not wait for the engine.
        """
        self._listeners[request] = listener

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests that have not ended; returns at once, from any thread and from a garbage collection within any.

        Args:
            requests: read when the engine comes to it, after what was handed to it before.
        """

        def action() -> None:
            for request in requests:
                self.engine.abort(request)
                self._tell(request)

        # no thread is woken: where none runs, no request does either
        self._inbox.put(Action(action, lambda error: None))

    def _wake(self) -> None:
        """See that a thread runs."""
        with self._lock:
            if self._cause is not None:
                raise self._refusal()
            if self._thread is None or not self._thread.is_alive():  # a fork leaves a thread behind that does not run
                thread = threading.Thread(target=self._run, name="engine", daemon=True)
                thread.start()
                self._thread = thread

    def _refusal(self) -> Refused:
        error = Refused(f"the engine has ended ({type(self._cause).__name__}: {self._cause}): open the model again")
        error.__cause__ = self._cause
        return error

    def _run(self) -> None:
        try:
            while self._has_work():
                self._turn()
        except BaseException as cause:
            self._end(cause)

    def _has_work(self) -> bool:
        """Whether the thread goes on; it is gone for others as soon as the answer is no."""
        with self._lock:
            if self._inbox.empty() and not self.engine.busy:
                self._thread = None
                return False
            return True

    def _turn(self) -> None:
        """Run what has been handed over, then a step."""
        for _ in range(self._inbox.qsize()):
            self._act(self._inbox.get())
        if self.engine.failure is not None:  # while weights were loaded
            raise self.engine.failure
        if not self.engine.busy:
            return
        try:
            news = self.engine.step()
        except BaseException:
            if self.engine.failure is not None:
                raise
            return  # the requests that have ended by it are the news of the next step
        for request in news:
            self._tell(request)

    def _act(self, action: Action) -> None:
        try:
            action.run()
        except BaseException as error:
            self._call(action.fail, error)

    def _call(self, listener: Callable[[Any], None], news: Any) -> bool:
        """Tell somebody; False if that fails, as it does when an event loop was closed and nobody is left to be told."""
        try:
            listener(news)
        except BaseException:
            LOG.warning("a listener of the engine failed; its request is ended", exc_info=True)
            return False
        return True

    def _tell(self, request: Request) -> None:
        """Call the listener of a request, if it has one; one that fails ends its request alone."""
        listener = self._listeners.get(request)
        if listener is None:
            return
        if request.finish_reason is not None:
            del self._listeners[request]
        if not self._call(listener, request):
            self._listeners.pop(request, None)
            self.engine.abort(request)

    def _end(self, cause: BaseException) -> None:
        """Tell everybody who waits that the engine has ended."""
        with self._lock:
            self._cause, self._thread = cause, None
        listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            self._call(listener, self._refusal())
        while not self._inbox.empty():
            self._call(self._inbox.get().fail, self._refusal())
