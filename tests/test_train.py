"""The command `python -m maxtrain.train`: exit codes, the dry run, and runs that are killed or run out of disk."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from maxtrain import train
from maxtrain.training import loop

ROOT = Path(__file__).parents[1]
SETTINGS = ["train.steps=120", "checkpoint.every=10", "eval.every=40"]


def start(folder, *overrides, devices=1):
    """The command as a user gives it, in a process of its own."""
    command = [sys.executable, "-m", "maxtrain.train", "tests/tiny.yml", f"run.dir={folder}", f"data.cache_dir={folder.parent}/data"]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['MAXTRAIN_TEST_COMPILE']}"}
    return subprocess.Popen([*command, *SETTINGS, *overrides], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Exit code and what was printed on stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def rows(folder):
    """The complete rows of metrics.jsonl; none if it does not exist yet."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder) if "loss" in row]


def last_step(folder):
    return max((row["step"] for row in rows(folder) if "loss" in row), default=0)


def wait_until(process, condition):
    """Wait for the condition or the end of the process, and say whether the process still runs."""
    while process.poll() is None and not condition():
        time.sleep(0.002)
    return process.poll() is None


def kill_and_finish(folder, moments):
    """Kill the command at each of the moments (conditions), then let it finish."""
    for moment in moments:
        process = start(folder)
        wait_until(process, moment)
        process.send_signal(signal.SIGKILL)
        _, errors = finish(process)
        assert process.returncode in (-signal.SIGKILL, 0), errors
    code, errors = finish(start(folder))
    assert code == 0, errors


def after(seconds):
    """A moment so many seconds after one has begun to wait for it."""
    asked = []

    def passed():
        asked.append(time.monotonic())
        return asked[-1] - asked[0] > seconds

    return passed


def being_written(folder):
    """The moment when a checkpoint is being written; not the first one, and not one that an earlier process left half done."""
    begun = []

    def passed():
        begun.append(time.time())
        try:
            fresh = any(path.stat().st_mtime > begun[0] for path in (folder / "checkpoints").glob("*.new/*"))
        except FileNotFoundError:  # complete and renamed in the meantime
            fresh = False
        return fresh and last_step(folder) > 10

    return passed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, errors = finish(start(folder))
    assert code == 0, errors
    found = losses(folder)
    assert [row[0] for row in found] == list(range(1, 121))
    return found


@pytest.mark.slow
def test_killed_runs_give_the_losses_of_an_uninterrupted_one(whole, tmp_path):
    folder = tmp_path / "run"
    kill_and_finish(folder, [being_written(folder), lambda: last_step(folder) >= 67])
    assert losses(folder) == whole
    steps = [row["step"] for row in rows(folder) if "eval/held/loss" in row]
    assert steps == [40, 80, 120]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_often_give_the_losses_of_an_uninterrupted_one(whole, tmp_path, seed):
    folder, draw = tmp_path / "run", random.Random(seed)
    moments = [moment for _ in range(3) for moment in (being_written(folder), after(draw.uniform(2, 8)))]
    kill_and_finish(folder, moments)
    assert losses(folder) == whole


def test_a_stopped_run_and_one_out_of_disk_can_be_resumed(whole, tmp_path):
    """A limit on the size of files, below that of the embedding, stands for the full disk: no checkpoint fits."""
    folder = tmp_path / "run"
    process = start(folder)
    assert wait_until(process, lambda: last_step(folder) >= 30)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert str(last_step(folder)) in saved

    process = start(folder, "metrics.sinks=[console]")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    code, errors = finish(process)
    assert code == 1
    assert f"{folder}: the run cannot go on: saving the checkpoint of step" in errors
    assert "File too large" in errors
    assert f'File "{ROOT}/maxtrain' not in errors  # no traceback of ours
    assert {path.name for path in (folder / "checkpoints").iterdir() if (path / "manifest.json").exists()} == saved

    assert finish(start(folder))[0] == 0
    assert losses(folder) == whole


def obeys(process):
    """Whether SIGTERM would be caught by the process, as its kernel knows."""
    with open(f"/proc/{process.pid}/status") as file:
        (caught,) = (int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
    return bool(caught >> signal.SIGTERM - 1 & 1)


def test_a_signal_while_importing_is_obeyed_at_once(tmp_path):
    process = start(tmp_path / "run")
    assert wait_until(process, lambda: obeys(process))
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (75, "stopped by SIGTERM before the first step: nothing is lost, the same command starts again\n")
    assert not (tmp_path / "run").exists()


def test_refused_input_is_2_and_prints_no_traceback(tmp_path):
    refused = {"train.stepps=3": "train.steps", "model.vocab_size=200": "258", "mesh.data=3": "does not fit 1 devices"}
    for override, message in refused.items():
        code, errors = finish(start(tmp_path / "run", override))
        assert code == 2
        assert message in errors
        assert "Traceback" not in errors


def test_a_run_that_diverges_is_1(tmp_path, monkeypatch, capsys):
    def fit(trainer, stop=None):
        raise loop.Diverged("too many rollbacks")

    monkeypatch.setattr(loop.Trainer, "fit", fit)
    assert train.main([str(ROOT / "tests" / "tiny.yml"), f"run.dir={tmp_path}"]) == 1
    assert capsys.readouterr().err == f"{tmp_path}: the run cannot go on: too many rollbacks\n"


def test_dry_run_of_a_large_model_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([str(ROOT / "configs/models/llama3.1-8b.yml"), "data.length=8192", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "8,030,261,248" in text  # the published size
    norms = (2 * 32 + 1) * 4096  # on every device; the rest is split over the 8
    assert f"{(8_030_261_248 - norms) * 4 // 8 + norms * 4:,}" in text
    assert "kept activations" in text
    assert "fsdp=8" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of one process with four devices that share the weights."""
    folder = tmp_path_factory.mktemp("processes") / "one"
    assert finish(start(folder, devices=4))[0] == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["mesh.stage=2"], ["mesh.dcn.stage=2"], ["mesh.dcn.context=2"], ["mesh.dcn.data=2", "mesh.tensor=2"]]
)
def test_two_processes_train_as_one(words, one_process, tmp_path):
    """Whatever lies between the processes: weights, stages, sequences, replicas."""
    two = tmp_path / "two"
    with processes(two, *words) as started:
        assert [finish(process) for process in started] == [(0, ANY), (0, ANY)]
    assert_same(two, one_process)


@contextlib.contextmanager
def processes(folder, *words):
    """Two processes with two devices each that train together, killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mesh = [f"mesh.coordinator=127.0.0.1:{port}", "mesh.num_processes=2"]
    started = [start(folder, *mesh, *words, f"mesh.process_id={index}", devices=2) for index in range(2)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def assert_same(two, one):
    for found, wanted in zip(losses(two), losses(one), strict=True):
        assert found[0] == wanted[0]
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
        np.testing.assert_allclose(found[2], wanted[2], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [[0], [1], [0, 1]])
def test_a_signal_to_some_process_stops_all(asked, one_process, tmp_path):
    """After the same step, which is saved; and no step is lost or done twice."""
    two = tmp_path / "two"
    with processes(two) as started:
        assert wait_until(started[0], lambda: last_step(two) >= 30)
        for index in asked:
            started[index].send_signal(signal.SIGTERM)
        assert [finish(process) for process in started] == [(75, ANY), (75, ANY)]
    assert (two / "checkpoints" / str(last_step(two)) / "manifest.json").exists()
    with processes(two) as started:
        assert [finish(process) for process in started] == [(0, ANY), (0, ANY)]
    assert_same(two, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other(victim, tmp_path):
    two = tmp_path / "two"
    with processes(two) as started:
        assert wait_until(started[0], lambda: last_step(two) >= 30)
        started[victim].kill()
        killed = time.monotonic()
        code, errors = finish(started[1 - victim])
        assert time.monotonic() - killed < 30
    assert code == 76
    assert f"{two}: another process was lost: killed, or its host is gone; the same command goes on from step" in errors


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stands_still_for_a_while_is_waited_for(index, one_process, tmp_path):
    two = tmp_path / "two"
    with processes(two) as started:
        assert wait_until(started[0], lambda: last_step(two) >= 30)
        started[index].send_signal(signal.SIGSTOP)
        time.sleep(20)
        started[index].send_signal(signal.SIGCONT)
        assert [finish(process) for process in started] == [(0, ANY), (0, ANY)]
    assert_same(two, one_process)
