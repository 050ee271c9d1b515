"""Nobody waits for ever: whatever fails, whoever calls, from whichever thread."""

import gc
import threading

import pytest
from engines import within

from maxtrain.config.errors import Refused
from maxtrain.serving.driver import Driver
from maxtrain.serving.scheduler import Request


class Countdown:
    """An engine whose requests end after as many steps as they ask tokens."""

    def __init__(self):
        self.running, self.failure, self.broken = [], None, None

    @property
    def busy(self):
        return bool(self.running)

    def add(self, tokens):
        self.running.append(Request("r", (1,), None, tokens, b""))
        return self.running[-1]

    def abort(self, request):
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self.running.remove(request)

    def step(self):
        if self.broken is not None:
            self.failure = self.broken
            raise self.broken
        news = list(self.running)
        for request in news:
            request.tokens.append(0)
            if request.num_output >= request.max_tokens:
                request.finish_reason = "length"
                self.running.remove(request)
        return news


@pytest.fixture
def driver():
    return Driver(Countdown())


def start(driver, tokens, listener=None):
    """A request, and the event that its end sets."""
    ended = threading.Event()

    def told(news):
        if isinstance(news, BaseException) or news.finish_reason is not None:
            ended.set()

    def add():
        request = driver.engine.add(tokens)
        driver.listen(request, listener or told)
        return request

    return within(lambda: driver.do(add)), ended


def test_a_listener_that_raises_ends_its_own_request_alone(driver):
    def bad(news):
        raise RuntimeError("Event loop is closed")

    first, _ = start(driver, 10**9, bad)
    other, ended = start(driver, 50)
    assert ended.wait(10)
    assert (first.finish_reason, other.finish_reason) == ("abort", "length")
    assert within(lambda: driver.do(lambda: 3)) == 3


def test_what_the_engine_calls_runs_its_actions_at_once(driver):
    seen = []

    def listener(news):
        seen.append(driver.do(lambda: "at once"))
        driver.abort([news])

    request, _ = start(driver, 10**9, listener)
    while request.finish_reason is None:
        within(lambda: driver.do(lambda: None))
    assert seen[0] == "at once"
    assert request.finish_reason == "abort"


def test_an_action_that_raises_reaches_its_caller_alone(driver):
    _, ended = start(driver, 50)
    with pytest.raises(ZeroDivisionError):
        within(lambda: driver.do(lambda: 1 / 0))
    assert ended.wait(10)


def test_abort_returns_at_once_also_from_a_garbage_collection_in_the_engines_thread(driver):
    class Forgotten:
        def __init__(self, request):
            self.request, self.itself = request, self

        def __del__(self):
            driver.abort([self.request])

    forgotten, _ = start(driver, 10**9)
    Forgotten(forgotten)
    within(lambda: driver.do(gc.collect))
    while forgotten.finish_reason is None:
        within(lambda: driver.do(lambda: None))
    idle = Driver(Countdown())
    idle.abort([])
    assert idle.do(lambda: 1) == 1


def test_an_engine_that_has_ended_tells_all_who_wait_and_refuses_the_rest(driver):
    told, hold, ended = [], threading.Event(), threading.Event()

    def listener(news):
        if isinstance(news, BaseException):
            told.append(news)

    start(driver, 10**9, listener)

    def breaks():
        hold.wait(10)
        driver.engine.broken = OSError("the device is lost")

    def fail(error):
        told.append(error)
        ended.set()

    driver.post(breaks, told.append)
    driver.post(driver.engine.step, lambda error: None)  # what happens behind the engine's back is seen before the next step
    hold.set()
    while driver._thread is not None:
        ended.wait(0.001)
    with pytest.raises(Refused, match="OSError: the device is lost") as refusal:
        driver.post(lambda: None, fail)
    with pytest.raises(Refused, match="OSError: the device is lost"):
        within(lambda: driver.do(lambda: None))
    assert isinstance(refusal.value.__cause__, OSError)
    assert [type(news) for news in told] == [Refused]


def test_who_waits_while_the_engine_ends_is_told(driver):
    driver._end(OSError("the device is lost"))
    driver._cause = None  # as it was when the action was handed over
    told = []
    driver._wake = lambda: None
    driver.post(lambda: None, told.append)
    driver._end(OSError("the device is lost"))
    assert [str(error) for error in told] == ["the engine has ended (OSError: the device is lost): open the model again"]
