"""What processes hear of each other's end; threads with real connections stand for them."""

import threading

import pytest

from maxtrain.parallel import peers
from maxtrain.parallel.peers import DONE, FAILED, LOST, STOPPED, Peers


class Process:
    """One end of the connections, and the last word that it heard."""

    def __init__(self, connections):
        self.heard, self.event = [], threading.Event()
        self.connections, self.peers = connections, Peers(connections, self.end)

    def end(self, word):
        self.heard.append(word)
        self.event.set()

    def die(self):
        """As the kernel does it."""
        for connection in self.connections:
            connection.shutdown(2)


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    with peers.listen() as server:
        port = server.getsockname()[1]
        stranger = peers.connect("127.0.0.1", port, "wrong!")
        others = [peers.connect("127.0.0.1", port, "secret") for _ in range(2)]
        accepted = peers.accept(server, "secret", 2)
    assert stranger.recv(1) == b""
    processes = [Process(accepted), *(Process([connection]) for connection in others)]
    yield processes
    for connection in [stranger, *accepted, *others]:
        connection.close()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_hear_of_a_death(three, victim):
    three[victim].die()
    for index, process in enumerate(three):
        if index != victim:
            assert process.event.wait(5)
            assert process.heard in ([b""], [LOST])


def test_all_hear_of_a_stop_before_the_first_step(three):
    three[2].peers.close(STOPPED, wait=5)
    for process in three[:2]:
        assert process.event.wait(5)
        assert process.heard == [STOPPED]


def test_processes_that_fail_alike_hear_nothing(three):
    for process in three:
        process.peers.close(FAILED)
    for process in three:
        process.peers.close(FAILED, wait=5)
        assert not process.heard


def test_a_failure_of_one_is_told(three):
    three[1].peers.close(FAILED)
    for process in (three[0], three[2]):
        assert process.event.wait(5)
    assert (three[0].heard, three[2].heard) == ([FAILED], [LOST])


def test_the_end_of_the_work_is_no_loss(three):
    for process in three:
        process.peers.close(DONE)
    for process in three:
        process.peers.close(DONE, wait=5)
        process.die()
    assert not any(process.heard for process in three)
