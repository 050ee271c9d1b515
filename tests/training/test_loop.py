"""The loop: what a run's folder holds, and that a run is the same whatever interrupts it."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from maxtrain import train
from maxtrain.config import load
from maxtrain.config.errors import Refused
from maxtrain.data.pipeline import TrainData
from maxtrain.data.tokenizer import ByteTokenizer
from maxtrain.parallel import mesh
from maxtrain.training.loop import Diverged, Hook, Stopped, Trainer
from maxtrain.training.run import Lock
from maxtrain.training.step import next_token_loss

TINY = Path(__file__).parents[1] / "tiny.yml"
CONTRACT = {"step", "loss", "tokens", "tokens_per_second", "mfu", "grad_norm", "lr", "param_norm", "step_seconds", "data_seconds"}
CONTRACT |= {"compute_seconds", "checkpoint_seconds", "memory_peak_bytes", "goodput", "tflops_per_second", "skipped"}


@pytest.fixture(autouse=True, scope="module")
def devices():
    """One device, for which compiling takes a fraction of the time; the list may be changed."""
    chosen, make_mesh = jax.devices()[:1], mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, chosen))
        yield chosen


@pytest.fixture
def four_devices(devices):
    devices[:] = jax.devices()[:4]
    yield
    del devices[1:]


def make(folder, cache_dir, *overrides):
    return load(TINY, [f"run.dir={folder}", f"data.cache_dir={cache_dir}", *overrides]).config


def read(folder):
    """The rows of metrics.jsonl: of steps, of evaluations, and the events."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    return steps, [row for row in rows if "eval/held/loss" in row], [row["event"] for row in rows if "event" in row]


def losses(folder):
    """Step and loss of every row, which stand for a run being the same bit for bit."""
    steps, evals, _ = read(folder)
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in steps], [row["eval/held/loss"] for row in evals]


class At(Hook):
    """Does something when the numbers of a step have arrived."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, trainer, row):
        if row["step"] == self.step:
            self.action()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise ZeroDivisionError


class Diary(Hook):
    """Calls of the hooks; and, in `order`, which steps were dispatched and which arrays of steps the host waited for."""

    def __init__(self):
        self.calls, self.order, self.made = [], [], {}

    def watched(self, wait):
        """`wait`, noting the steps that the arrays it is given come from; `other` stands for arrays of no step."""

        def waiting(arrays, *args, **keys):
            self.order.append({self.made.get(id(leaf), "other") for leaf in jax.tree.leaves(arrays)})
            return wait(arrays, *args, **keys)

        return waiting

    def on_start(self, trainer):
        self.calls.append("start")
        step = trainer.step

        def dispatched(*args):
            out = step(*args)
            self.order.append(len(self.made.setdefault("steps", [])) + 1)
            self.made["steps"].append(out[1])  # kept, so that no id is used twice
            self.made |= {id(leaf): self.order[-1] for leaf in jax.tree.leaves(out)}
            return out

        trainer.step = dispatched

    def on_step(self, trainer, row):
        self.calls.append(row["step"])
        row["noted"] = row["step"] ** 2

    def on_eval(self, trainer, row):
        self.calls.append(f"eval {int(trainer.state.step)}")

    def on_end(self, trainer):
        self.calls.append("end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache_dir):
    """An uninterrupted run with everything switched on: its trainer and folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    diary = Diary()
    trainer = Trainer(make(folder, cache_dir, "metrics.sinks=[console, jsonl, tensorboard]"), hooks=[diary])
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((jax, "device_get"), (jax, "block_until_ready"), (multihost_utils, "process_allgather")):
            patch.setattr(module, name, diary.watched(getattr(module, name)))
        trainer.fit()
    return trainer, folder, diary


def test_metrics_keep_the_contract(whole):
    _, folder, _ = whole
    steps, evals, events = read(folder)
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(row.keys() >= CONTRACT for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert np.diff([0, *(row["tokens"] for row in steps)]).max() <= 8 * 32
    assert "compile_seconds" in steps[0]
    assert [row["step"] for row in evals] == [5, 10, 15, 20]
    for row in evals:
        assert row["eval/held/perplexity"] == pytest.approx(np.exp(row["eval/held/loss"]))
        assert row["eval/held/bits_per_byte"] > 0
    assert not events
    assert list((folder / "tensorboard").glob("events*"))


def test_losses_and_tokens_of_the_sources_add_up(whole):
    steps, _, _ = read(whole[1])
    for before, row in zip([{"tokens": 0}, *steps], steps, strict=False):
        counts = [row[f"tokens/{name}"] for name in ("long", "short")]
        assert sum(counts) == row["tokens"] - before["tokens"]
        mean = sum(row[f"loss/{name}"] * count for name, count in zip(("long", "short"), counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(row["loss"], rel=1e-6)


def test_folder_describes_the_run(whole):
    trainer, folder, _ = whole
    assert load(folder / "config.yml").config == trainer.config
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"git", "versions", "flags", "command", "devices"} <= manifest.keys()
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["devices"]["count"] == 8
    assert manifest["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trainer.state.model))
    assert (folder / "tokenizer" / "tokenizer.json").exists()


def test_checkpoints_carry_the_metrics_that_best_reads(whole):
    _, folder, _ = whole
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"15", "20"}
    record = json.loads((folder / "checkpoints" / "15" / "record.json").read_text())
    assert record["metrics"]["eval/held/loss"] == read(folder)[1][2]["eval/held/loss"]
    assert (record["meta"]["step"], record["meta"]["data_step"]) == (15, 15)


def test_hooks_see_the_run_and_may_add_to_its_rows(whole):
    _, folder, diary = whole
    assert [call for call in diary.calls if isinstance(call, int)] == list(range(1, 21))
    assert [diary.calls[0], diary.calls[-1]] == ["start", "end"]
    assert [call for call in diary.calls if str(call).startswith("eval")] == ["eval 5", "eval 10", "eval 15", "eval 20"]
    assert read(folder)[0][3]["noted"] == 16


def test_between_two_dispatches_only_the_older_step_is_waited_for(whole):
    """But for steps at whose end something is done with the state, every fifth here."""
    order = whole[2].order
    for step in range(2, 20):
        between = order[order.index(step) + 1 : order.index(step + 1)]
        assert ({step - 1} in between) == bool((step - 1) % 5)  # those of every fifth have been read by then
        if step % 5:
            assert all(waited == {step - 1} for waited in between)


# ---------------------------------------------------------------------------------------------------- interruptions


def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path, cache_dir):
    config = make(tmp_path, cache_dir)
    with pytest.raises(Stopped):
        Trainer(config, hooks=[At(6, terminate)]).fit()
    steps, _, events = read(tmp_path)
    assert len(steps) == 9  # when the numbers of step 6 arrive, 7 is under way; 8 is told; 9 is under way when those of 8 arrive
    assert events == ["stopped by SIGTERM, saved; the same command goes on from here"]
    trainer = Trainer(config)
    trainer.fit()
    assert losses(tmp_path) == losses(whole[1])
    assert read(tmp_path)[2][1:] == [f"resumed from the checkpoint of step {len(steps)}"]
    for a, b in zip(jax.tree.leaves(trainer.state), jax.tree.leaves(whole[0].state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_crash_costs_the_steps_since_the_last_checkpoint_only(whole, tmp_path, cache_dir):
    config = make(tmp_path, cache_dir)
    with pytest.raises(ZeroDivisionError):
        Trainer(config, hooks=[At(13, crash)]).fit()
    assert [row["step"] for row in read(tmp_path)[0]] == list(range(1, 13))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "loss": 3.')  # as a kill may leave it
    diary = Diary()
    Trainer(config, hooks=[diary]).fit()
    assert diary.calls[1] == 11
    assert losses(tmp_path) == losses(whole[1])


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path, cache_dir):
    shutil.copytree(whole[1], tmp_path / "run")
    diary = Diary()
    Trainer(make(tmp_path / "run", cache_dir), hooks=[diary]).fit()
    assert diary.calls == ["start", "end"]
    assert losses(tmp_path / "run") == losses(whole[1])


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_damaged_checkpoints_are_found_and_the_one_before_is_used(whole, tmp_path, cache_dir, harm):
    shutil.copytree(whole[1], tmp_path / "run")
    victim = max((tmp_path / "run" / "checkpoints" / "20" / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    match harm:
        case "flipped":
            victim.write_bytes(data)
        case "truncated":
            victim.write_bytes(data[:-1])
        case "missing":
            victim.unlink()
    diary = Diary()
    Trainer(make(tmp_path / "run", cache_dir), hooks=[diary]).fit()
    assert diary.calls[1] == 16
    assert losses(tmp_path / "run") == losses(whole[1])
    _, _, events = read(tmp_path / "run")
    assert "resumed from the checkpoint of step 15" in events
    assert any("checkpoints/20" in event and victim.name in event for event in events)


@pytest.mark.parametrize("words", [(), ("checkpoint.resume=false",)], ids=["", "a new run is wanted"])
@pytest.mark.parametrize("harm", ["flipped", "removed", "emptied"])
def test_without_a_good_checkpoint_a_run_that_had_one_is_refused_and_left_as_it_is(whole, tmp_path, cache_dir, harm, words):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    for record in list(folder.glob("checkpoints/*/record.json")):
        match harm:
            case "flipped":
                record.write_text(record.read_text().replace("step", "stop", 1))
            case "emptied":
                shutil.rmtree(record.parent)
    if harm == "removed":
        shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(Refused, match=r"no good checkpoint is left|checkpoint\.resume is false"):
        Trainer(make(folder, cache_dir, *words)).fit()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_a_second_trainer_is_refused_before_it_does_anything(whole, tmp_path, cache_dir):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    lock = Lock(str(folder))
    lock.hold()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match=f"process {os.getpid()} on .* trains here"):
        Trainer(make(folder, cache_dir)).fit()
    lock.release()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_line_of_the_metrics_is_told_and_the_run_goes_on(whole, tmp_path, cache_dir):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"step": 7,', '"step" 7,'))
    Trainer(make(folder, cache_dir)).fit()
    steps, _, events = read(folder)
    assert [row["step"] for row in steps] == [*range(1, 7), *range(8, 21)]
    assert any("damaged lines are left out" in event for event in events)
    assert any("missing: 7 to 7" in event for event in events)


@pytest.fixture(scope="module")
def half(tmp_path_factory, cache_dir):
    """A run that crashed behind step 10."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(ZeroDivisionError):
        Trainer(make(folder, cache_dir), hooks=[At(11, crash)]).fit()
    return folder


def test_a_run_goes_on_on_more_devices(whole, half, tmp_path, cache_dir, four_devices):
    shutil.copytree(half, tmp_path / "run")
    Trainer(make(tmp_path / "run", cache_dir, "mesh.data=2", "mesh.fsdp=2")).fit()
    (found, evals), (wanted, wanted_evals) = losses(tmp_path / "run"), losses(whole[1])
    assert found[:10] == wanted[:10]
    np.testing.assert_allclose([row[1] for row in found], [row[1] for row in wanted], rtol=1e-5)
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in wanted], rtol=1e-4)
    np.testing.assert_allclose(evals, wanted_evals, rtol=1e-5)
    assert "mesh.data: 1 in the checkpoint, 2 now" in read(tmp_path / "run")[2][0]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("model.mlp=64", "model.mlp: 48 in the checkpoint, 64 now"),
        ("precision.moments=bfloat16", "precision.moments: 'float32' in the checkpoint, 'bfloat16' now"),
        ("guard.window=16", "guard.window: 128 in the checkpoint, 16 now"),
    ],
)
def test_a_change_that_breaks_the_model_is_refused(half, cache_dir, change, difference):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match=difference):
        Trainer(make(half, cache_dir, change)).fit()
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_a_harmless_change_is_told_and_taken(half, tmp_path, cache_dir):
    shutil.copytree(half, tmp_path / "run")
    changes = ["optimizer.weight_decay=0.2", "data.sources.long.weight=2"]
    trainer = Trainer(make(tmp_path / "run", cache_dir, *changes))
    trainer.fit()
    steps, _, (event,) = read(tmp_path / "run")
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert "optimizer.weight_decay: 0.1 in the checkpoint, 0.2 now" in event
    assert "the training data has changed" in event
    assert load(tmp_path / "run" / "config.yml").config == trainer.config


def test_a_folder_in_use_is_refused_when_a_new_run_is_wanted(half, cache_dir):
    with pytest.raises(Refused, match=r"checkpoint\.resume is false"):
        Trainer(make(half, cache_dir, "checkpoint.resume=false")).fit()


@pytest.mark.slow
def test_another_batch_size_goes_on_at_the_next_window(half, tmp_path, cache_dir):
    """10 steps of 8 windows and 10 of 4; a rollback keeps its place too."""
    shutil.copytree(half, tmp_path / "run")
    trainer = Trainer(make(tmp_path / "run", cache_dir, "data.batch_size=4"))
    trainer.fit()
    meta = json.loads((tmp_path / "run/checkpoints/20/record.json").read_text())["meta"]
    assert meta["windows"] == 10 * 8 + 10 * 4
    first = trainer.data.batch(10, range(4), trainer.first_window)
    whole = TrainData(trainer.config.data, trainer.config.train.seed, ByteTokenizer())
    for name, rows in first.items():
        np.testing.assert_array_equal(rows, whole.batch(20, range(4))[name])


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_words(tmp_path, cache_dir, capsys, monkeypatch):
    def kill():
        for worker in multiprocessing.active_children():
            worker.kill()

    monkeypatch.setattr("maxtrain.llm.probes", lambda cfg: [At(2, kill)])
    assert train.main([str(TINY), f"run.dir={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "data.workers=1"]) == 1
    assert "a process that prepares data (data.workers) was killed; the same command goes on" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- bad steps


class Poison(Hook):
    """Marks the batches of some data steps by negative segments, for which `fragile` gives a loss that is not a number."""

    def __init__(self, *bad):
        self.bad = bad

    def on_start(self, trainer):
        step = trainer.step

        def poisoned(state, batch, stop):
            sign = -1 if int(state.data_step) in self.bad else 1
            return step(state, batch | {"segments": sign * batch["segments"]}, stop)

        trainer.step = poisoned


def fit(config, *bad, hooks=()):
    plain = next_token_loss(config, len(config.data.sources))

    def fragile(model, batch):
        total, sums = plain(model, batch)
        factor = jnp.where((batch["segments"] < 0).any(), jnp.nan, 1.0)
        return total * factor, sums | {"loss": sums["loss"] * factor}

    return Trainer(config, loss_fn=fragile, hooks=[Poison(*bad), *hooks]).fit()


def test_bad_steps_are_skipped_then_left_behind(whole, tmp_path, cache_dir):
    """Batches 2, and 5 to 8, are bad: the first is skipped; the third in a row of the others, step 8, takes the run back to step 5."""
    config = make(tmp_path, cache_dir, "guard.max_skipped=3", "metrics.profile.start=6", "metrics.profile.steps=3")
    state = fit(config, 2, 5, 6, 7, 8)
    steps, evals, events = read(tmp_path)
    assert events == [
        "rolled back from step 8 to step 5 after 3 skipped steps in a row; batches 5 to 7 are skipped for good (rollback 1 of 3)"
    ]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["step"] for row in steps if row["skipped"]] == [3, 6]
    assert steps[2]["loss"] is None
    assert steps[1]["loss"] == pytest.approx(losses(whole[1])[0][1][1], rel=1e-6)
    data, used = TrainData(config.data, config.train.seed, ByteTokenizer()), [*range(5), *range(8, 23)]
    counted = np.cumsum([int(data.batch(step, range(8))["weights"].sum()) for step in used])
    assert [row["tokens"] for row in steps] == counted.tolist()
    assert (int(state.step), int(state.data_step), int(state.guard.counted)) == (20, 23, 18)
    assert [row["step"] for row in evals] == [5, 10, 15, 20]
    assert json.loads((tmp_path / "checkpoints" / "20" / "record.json").read_text())["meta"]["rollbacks"] == 1
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_no_checkpoint_is_made_of_skipped_steps(tmp_path, cache_dir):
    """Of step 5, within a row of bad steps, there is none to go back to; batch 6 alone must not send the run back again."""
    config = make(tmp_path, cache_dir, "guard.max_skipped=3", "guard.max_rollbacks=1")
    fit(config, 3, 4, 5, 6)
    steps, _, (event,) = read(tmp_path)
    assert "rolled back from step 6 to step 0" in event
    assert [row["step"] for row in steps if row["skipped"]] == [1]


def test_last_steps_that_were_skipped_are_not_the_end(tmp_path, cache_dir):
    """Batch 19, of the last step, is bad: the run goes back to step 15 and ends with other batches."""
    state = fit(make(tmp_path, cache_dir), 19)
    steps, _, (event,) = read(tmp_path)
    assert "rolled back from step 20 to step 15 after a skipped step" in event
    assert not any(row["skipped"] for row in steps)
    assert (int(state.step), int(state.data_step)) == (20, 25)


def test_each_rollback_goes_one_checkpoint_further(tmp_path, cache_dir):
    """From step 12 to step 10; then, before the run has come past step 12, to step 5; from step 18, past it, to step 15."""
    config = make(tmp_path, cache_dir, "guard.max_skipped=1", "checkpoint.keep_last=9")
    fit(config, 11, 12, 25)
    _, _, events = read(tmp_path)
    assert [event.split(" after")[0] for event in events if "rolled" in event] == [
        "rolled back from step 11 to step 5",
        "rolled back from step 18 to step 15",
    ]


def test_a_run_that_cannot_be_saved_ends(tmp_path, cache_dir):
    config = make(tmp_path, cache_dir, "guard.max_skipped=2", "guard.max_rollbacks=2")
    with pytest.raises(Diverged, match="2 skipped steps in a row after 2 rollbacks"):
        fit(config, *range(6, 40))
    assert sum("rolled back" in event for event in read(tmp_path)[2]) == 2
    assert (tmp_path / "checkpoints" / "5").exists()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_does_not_go_back_to_its_beginning(tmp_path, cache_dir):
    def damage():
        record = tmp_path / "checkpoints" / "5" / "record.json"
        while not record.exists():  # it is written in the background
            time.sleep(0.01)
        record.write_text(record.read_text().replace("step", "stop", 1))

    config = make(tmp_path, cache_dir, "guard.max_skipped=2")
    with pytest.raises(Diverged, match="no good checkpoint is left to go back to"):
        fit(config, 6, 7, hooks=[At(6, damage)])
    assert len(read(tmp_path)[0]) == 8
    assert list((tmp_path / "checkpoints").glob("5*"))


def test_without_a_checkpoint_the_run_goes_back_to_its_beginning(tmp_path, cache_dir):
    config = make(tmp_path, cache_dir, "guard.max_skipped=2", "checkpoint.every=null")
    state = fit(config, 1, 2)
    steps, _, (event,) = read(tmp_path)
    assert "to step 0" in event
    assert (len(steps), int(state.data_step)) == (20, 23)
