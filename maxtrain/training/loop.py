"""The training loop: from a config to a trained model, through interruptions and bad steps."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data.pipeline import TrainData
from maxtrain.data.tokenizer import Tokenizer, load_tokenizer
from maxtrain.models import flops
from maxtrain.parallel import mesh, peers
from maxtrain.parallel.sharding import Layout, parameter_table
from maxtrain.training import pretrained
from maxtrain.training import run as runs
from maxtrain.training import state as states
from maxtrain.training.evaluation import Evaluator, make_sets
from maxtrain.training.hardware import memory_peak_bytes, peak_tflops
from maxtrain.training.metrics import Recorder
from maxtrain.training.optimizer import check_trainable
from maxtrain.training.program import Program, local_rows, make_program, put_batch, put_stop
from maxtrain.training.signals import STOPPED, StopSignal
from maxtrain.training.state import TrainState
from maxtrain.training.step import LossFn


class Stopped(Exception):
    """A signal asked the run to stop; its state has been saved and the same command resumes it."""


class Diverged(RuntimeError):
    """Too many rollbacks: the run cannot get past its bad steps."""


class Hook:
    """Extra behaviour at fixed points of the loop; override what you need. `row` may be added to before it is written."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, state in place."""

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After a step's numbers have arrived; `trainer.state` may be a step ahead."""

    def on_eval(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After an evaluation; `trainer.state` is the evaluated one."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last checkpoint."""


class Trainer:
    """One run. `Trainer(config).fit()` trains to the end, resuming what the run's folder holds.

    Args:
        config: a validated config.
        loss_fn: what to minimise (see `step.LossFn`); next-token cross-entropy by default.
        hooks: extra behaviour, called in order.
    """

    def __init__(self, config: schema.Config, *, loss_fn: LossFn | None = None, hooks: Sequence[Hook] = ()):
        self.config, self.custom_loss, self.hooks = config, loss_fn, tuple(hooks)
        self.tokens = self.rollbacks = 0
        self.retreat: tuple[int, int] | None = None  # the step that the last rollback went back from, and to
        self.skipped = 0  # steps in a row, up to the last one whose numbers have arrived
        self.stopping = False  # a process has been asked to stop, and all know
        self.first_window = 0  # where batch 0 would begin, had all batches been of this size
        self.saved_step = -1
        self.useful_seconds = self.checkpoint_seconds = 0.0
        self.state: TrainState
        self.program: Program
        self.peers: peers.Peers | None = None

    # ------------------------------------------------------------------------------------------------- setting up

    def prepare(self) -> None:
        """Data first (no device is touched for input that will be refused), then devices, programs and state."""
        check_trainable(self.config)
        os.makedirs(self.config.run.folder, exist_ok=True)
        self.lock = runs.Lock(self.config.run.folder)
        try:
            self._prepare()
        except BaseException:
            self.lock.release()
            raise

    def _prepare(self) -> None:
        if self.config.mesh.num_processes == 1:  # of several, the first is known only when they have met
            self.lock.hold()
        notes: list[str] = []
        if runs.recorded(self.config) is not None:
            runs.check_files(self.config.run.folder, notes.append, resuming=True)
        self.config, self.source = pretrained.settle(self.config)
        self.tokenizer: Tokenizer = runs.own_tokenizer(self.config) or load_tokenizer(self.config.data)
        if self.source is not None:
            pretrained.check_tokenizer(self.source, self.tokenizer)
        if self.tokenizer.text_size > self.config.model.vocab_size:
            remedy = f"raise it to {self.tokenizer.text_size} or more" if self.source is None else "take the tokenizer it was trained with"
            raise Refused(f"model.vocab_size={self.config.model.vocab_size} is smaller than the tokenizer's vocabulary: {remedy}")
        self.data = TrainData(self.config.data, self.config.train.seed, self.tokenizer)
        sets = make_sets(self.config, self.tokenizer)
        mesh.start(self.config.run, self.config.mesh)
        self.peers = peers.join(self._follow)
        if jax.process_index() == 0:
            self.lock.hold()
        device_mesh = mesh.make_mesh(self.config.mesh)
        self.config = mesh.resolve(self.config, device_mesh)
        config = self.config
        self.program = make_program(config, Layout(device_mesh, config.mesh.rules), len(self.data.source_names), self.custom_loss)
        self.recorder = Recorder(config.run.folder, config.metrics, config.train.steps, jax.process_index() == 0)
        completed = partial(runs.note_checkpoint, config.run.folder)
        self.checkpointer = Checkpointer(os.path.join(config.run.folder, "checkpoints"), config.checkpoint, completed)
        newest = self._find_checkpoint(notes)
        start = time.perf_counter()
        self.batch_spec = self.program.batch(config.data.batch_size, config.data.length)
        self.step = self.program.lower_step().compile()
        self.evaluate = Evaluator(self.program, sets)
        self.compile_seconds: float | None = time.perf_counter() - start
        self.num_parameters = sum(p.size for p in parameter_table(self.program.state.model).values())
        peak = config.metrics.peak_tflops or peak_tflops(jax.devices()[0], config.precision.compute)
        self.peak = None if peak is None else peak * jax.device_count()
        if self.peers is not None:
            self.peers.meet("compiled")
        self._start_from(newest, notes)
        if jax.process_index() == 0:
            runs.describe(config, self.tokenizer, self.num_parameters, resumed=newest is not None)

    def say(self, message: str) -> None:
        """Record an event of the run, on the console and in the metrics."""
        self.recorder.write({"step": int(self.state.step) if hasattr(self, "state") else 0, "event": message})

    def _find_checkpoint(self, notes: list[str]) -> int | None:
        """The newest good checkpoint, if there is one; what is to be said joins `notes`. A misfit is refused before compiling."""
        folder = self.config.run.folder
        newest = self.checkpointer.newest_good(notes.append) if self.config.checkpoint.resume else None
        if newest is None:
            if not self.config.checkpoint.resume and self.checkpointer.steps():
                raise Refused(f"{folder} has checkpoints and checkpoint.resume is false: choose another run.dir")
            runs.check_nothing_lost(folder, self.checkpointer.traces(), notes)
            return None
        meta = self.checkpointer.read_meta(newest)
        if "data_step" not in meta:
            raise Refused(f"{folder} holds an imported model and no run: train it with model.init_from={folder} and another run.dir")
        changes = runs.check_resume(meta["config"], self.config)
        if meta["tokenizer"] != self.tokenizer.fingerprint:
            raise Refused(f"{folder}: its checkpoints were trained with another tokenizer: use another run.dir")
        before = self.data.fingerprint if "windows" in meta else self.data.fingerprint_of_batches(meta["config"]["data"]["batch_size"])
        if meta["data"] != before:
            changes.append("the training data has changed: batches from here on are those of the new data")
        notes.append("; ".join([f"resumed from the checkpoint of step {newest}", *changes]))
        return newest

    def _start_from(self, newest: int | None, notes: list[str]) -> None:
        """Take the state of a checkpoint or, without one, the initial state."""
        if newest is None:
            self.state = self._initial_state()
            notes += self.recorder.rewind(0)
        else:
            self._restore(newest)
            notes += self.recorder.rewind(newest, self.checkpointer.read_meta(newest).get("metrics"))
        for note in notes:
            self.say(note)

    def _initial_state(self) -> TrainState:
        if self.source is None and self.config.model.init_from is not None:
            raise OSError(f"no good checkpoint is left, and a run that has one does not open {self.config.model.init_from} again")
        model = None if self.source is None else self.source.load(self.program.state.model)
        return self.program.create(self.config.train.seed, model)

    def _restore(self, step: int) -> None:
        like = self.program.state
        self.state = states.unstack(self.checkpointer.restore(step, states.stack(like)), like)
        meta = self.checkpointer.read_meta(step)
        self.tokens, self.rollbacks, self.retreat = meta["tokens"], meta["rollbacks"], meta.get("retreat")
        windows = meta.get("windows", meta["data_step"] * meta["config"]["data"]["batch_size"])
        self.first_window = windows - meta["data_step"] * self.config.data.batch_size

    # --------------------------------------------------------------------------------------------------- training

    def fit(self, stop: StopSignal | None = None) -> TrainState:
        """Train to the last step and return the state. `stop` is what a command obeyed before this was imported.

        Raises:
            Stopped: SIGTERM or SIGINT arrived, here or in another process; the state was saved.
            Diverged: the guard rolled back more often than `guard.max_rollbacks`.
        """
        with stop or StopSignal() as self.stop:
            try:
                self._prepare_and_train()
            except BaseException as error:
                self._part(error)
                raise
            self._part()
        return self.state

    def _prepare_and_train(self) -> None:
        self.prepare()
        try:
            for hook in self.hooks:
                hook.on_start(self)
            self._train()
            for hook in self.hooks:
                hook.on_end(self)
        finally:
            self.checkpointer.close()
            self.recorder.close()
            self.lock.release()

    def _part(self, error: BaseException | None = None) -> None:
        """Tell the other processes that this one ends, and whether with its work done."""
        if self.peers is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(peers.PROBE_SECONDS)  # a collective failed because a process is lost: its connection tells, see `_follow`
        done = error is None or isinstance(error, Stopped)
        self.peers.close(peers.DONE if done else peers.FAILED, wait=0.0 if done else 2.0 * peers.GRACE_SECONDS)

    def _follow(self, word: bytes) -> None:
        """End this process, whatever it is waiting for, because another one has ended with this last word (see `Peers`)."""
        folder = self.config.run.folder
        if word == peers.STOPPED:
            peers.leave(STOPPED, f"{folder}: a signal stopped another process before the first step; the same command starts again")
        steps = self.checkpointer.steps() if hasattr(self, "checkpointer") else []
        last = f"goes on from step {steps[-1]}, the last complete checkpoint" if steps else "starts again: there is no complete checkpoint"
        how = "another process failed" if word == peers.FAILED else "another process was lost: killed, or its host is gone"
        peers.leave(peers.PEER_LOST, f"{folder}: {how}; the same command {last}")

    def _batches(self) -> Generator[dict[str, jax.Array]]:
        rows = local_rows(self.batch_spec["tokens"])
        batches = self.data.batches(int(self.state.data_step), rows, self.first_window)
        try:
            for batch in batches:
                yield put_batch(batch, self.batch_spec, rows)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise OSError("a process that prepares data (data.workers) was killed; the same command goes on") from error
        finally:
            batches.close()

    def _train(self) -> None:
        """Dispatch a step, then read the numbers of the one before it while the devices work.

        Whether to stop is an input of each step and comes back with its numbers, the same for all processes: nobody waits for
        anybody between steps, and all stop after the same one.
        """
        cfg, self.started = self.config, time.perf_counter()
        flags = {asked: put_stop(asked, self.program.stop) for asked in (False, True)}
        batches, step, pending = self._batches(), int(self.state.step), None
        last, self.read_at = cfg.train.steps, time.perf_counter()
        profiler = Profiler(cfg, step)
        while step < last or pending:
            stopping, dispatched = self.stopping, None
            if step < last and not stopping:
                profiler.before(step)
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                self.stop.stepping = True
                self.state, metrics = self.step(self.state, batch, flags[self.stop.name is not None])
                step += 1
                dispatched = (step, metrics, waited)
            due = dispatched and (step == last or self._due(step))
            for item in (pending, dispatched if due else None):
                if item and (why := self._finish_step(*item)):
                    batches.close()
                    step, batches, dispatched, due = self._roll_back(item[0], why), self._batches(), None, False
                    break
            pending = None if due else dispatched
            if due:
                self._at_boundary(step, last)
            if stopping:
                profiler.close()
                batches.close()
                self._stop(step)
        profiler.close()
        batches.close()

    def _stop(self, step: int) -> None:
        if self.saved_step != step:
            self._save(step)
        saved = ", saved; the same command goes on from here" if self.saved_step == step else "; the same command goes on from there"
        self.say(f"stopped by {self.stop.name or 'a signal to another process'}{saved}")
        raise Stopped

    def _due(self, step: int) -> bool:
        """Whether something is to be done with the state after this step."""
        return any(every and step % every == 0 for every in (self.config.eval.every, self.config.checkpoint.every))

    def _at_boundary(self, step: int, last: int) -> None:
        """Evaluate and save where it is due; all numbers up to `step` have been written."""
        metrics: dict[str, Any] = {}
        asked = self.config.eval.changed
        if asked and (step == last or (self.config.eval.every and step % self.config.eval.every == 0)):
            metrics = {"step": step, **self.evaluate(self.state.model)}
            for hook in self.hooks:
                hook.on_eval(self, metrics)
            self.recorder.write(metrics)
        if step == last or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
            self._save(step, metrics)
        if step == last:
            self.checkpointer.wait()
        self.read_at = time.perf_counter()

    def _save(self, step: int, metrics: dict[str, Any] | None = None) -> None:
        if self.skipped:
            kept = max(self.checkpointer.steps(), default=None)
            newest = "there is none yet" if kept is None else f"the newest one is that of step {kept}"
            self.say(f"no checkpoint is made of step {step}, as the {self.skipped} steps up to it were skipped: {newest}")
            return
        start = time.perf_counter()
        meta = {
            "step": step,
            "data_step": int(self.state.data_step),
            "windows": self.first_window + int(self.state.data_step) * self.config.data.batch_size,
            "tokens": self.tokens,
            "rollbacks": self.rollbacks,
            "retreat": self.retreat,
            "seed": self.config.train.seed,
            "config": self.config.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "versions": runs.versions(),
            "metrics": self.recorder.measure(),
        }
        self.checkpointer.save(step, states.stack(self.state), meta, metrics)
        self.checkpoint_seconds += time.perf_counter() - start
        self.saved_step = step

    def _finish_step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> str | None:
        """Write the row of a step; why the run cannot go on from its state, if it cannot."""
        host = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.read_at = now - self.read_at, now
        row = self._row(step, host, seconds, waited)
        for hook in self.hooks:
            hook.on_step(self, row)
        self.recorder.write(row)
        self.stopping |= bool(host["stop"])
        self.skipped = int(host["skipped_in_a_row"])
        if not host["finite"]:
            return "parameters or moments that are not finite"
        ended = step == self.config.train.steps  # what is not saved is not done
        if self.skipped < (1 if ended else self.config.guard.max_skipped):
            return None
        return f"{self.skipped} skipped steps in a row" if self.skipped > 1 else "a skipped step"

    def _row(self, step: int, host: dict[str, np.ndarray], seconds: float, waited: float) -> dict[str, Any]:
        tokens = float(host["tokens"])
        self.tokens += round(tokens)
        size = self.config.data.batch_size * self.config.data.length
        rate = size * flops.training(self.config.model, self.config.data.length) / seconds / 1e12
        saved, self.checkpoint_seconds = self.checkpoint_seconds, 0.0
        self.useful_seconds += 0.0 if host["skipped"] else max(0.0, seconds - waited)
        row: dict[str, Any] = {"step": step, "loss": float(host["loss"]) / max(tokens, 1.0), "tokens": self.tokens}
        row |= {name: float(host[name]) for name in ("lr", "grad_norm", "param_norm", "objective")}
        row |= {"skipped": int(host["skipped"]), "tokens_per_second": size / seconds, "tflops_per_second": rate}
        row |= {"mfu": None if self.peak is None else rate / self.peak, "step_seconds": seconds, "data_seconds": waited}
        row |= {"compute_seconds": max(0.0, seconds - waited), "checkpoint_seconds": saved, "memory_peak_bytes": memory_peak_bytes()}
        row["goodput"] = self.useful_seconds / max(1e-9, time.perf_counter() - self.started)
        if self.compile_seconds is not None:
            row["compile_seconds"], self.compile_seconds = self.compile_seconds, None
        row |= {name: float(host[name]) / max(tokens, 1.0) for name in ("balance", "router_z") if name in host}
        if "mtp_loss" in host:
            row["mtp_loss"] = float(host["mtp_loss"]) / max(float(host["mtp_tokens"]), 1.0)
        for index, name in enumerate(self.data.source_names if "loss_by_source" in host else ()):
            count = float(host["tokens_by_source"][index])
            row |= {f"tokens/{name}": round(count)} | ({f"loss/{name}": float(host["loss_by_source"][index]) / count} if count else {})
        return row

    def _roll_back(self, step: int, why: str) -> int:
        """Return from a step to a good checkpoint with the data moved past the bad window; the step to go on from.

        It is the newest one, or, if the run has not come past the place of the last rollback, the one before that it went back to.
        """
        bad_until = int(self.state.data_step) - (int(self.state.step) - step)
        rollbacks = self.rollbacks + 1
        if rollbacks > self.config.guard.max_rollbacks:
            raise Diverged(f"step {step}: {why} after {self.rollbacks} rollbacks")
        first_window = self.first_window
        self.checkpointer.wait()
        newest = self.checkpointer.newest_good(self.say)
        if newest is not None and self.retreat is not None and newest <= self.retreat[0]:
            newest = self.checkpointer.newest_good(self.say, before=self.retreat[1]) or min(newest, self.retreat[1])
        if newest is None and self.checkpointer.traces():
            raise Diverged(f"step {step}: {why}, and no good checkpoint is left to go back to")
        if newest is None:
            self.state, self.tokens = self._initial_state(), 0
        else:
            self._restore(newest)
            self.checkpointer.drop_after(newest)  # or a run that is killed now would go on from there
        self.first_window = first_window  # the batches go on where the bad ones ended, also behind a change of their size
        target, first = newest or 0, int(self.state.data_step)
        data_step, zero = (jax.device_put(np.int32(value), self.state.data_step.sharding) for value in (bad_until, 0))
        # The checkpoint may stem from within the bad window: its count of skipped steps would send the run back too soon
        guard = replace(self.state.guard, skipped_in_a_row=zero)
        self.state, self.rollbacks = replace(self.state, data_step=data_step, guard=guard), rollbacks
        self.retreat, self.skipped, self.saved_step = (step, target), 0, -1
        self.recorder.rewind(target)
        self.say(
            f"rolled back from step {step} to step {target} after {why}; "
            f"batches {first} to {bad_until - 1} are skipped for good (rollback {rollbacks} of {self.config.guard.max_rollbacks})"
        )
        return target


class Profiler:
    """Records the window of steps that the config names, for TensorBoard's profile page."""

    def __init__(self, config: schema.Config, first_step: int):
        self.cfg, self.first, self.running = config.metrics.profile, first_step, False
        self.folder = os.path.join(config.run.folder, "tensorboard")

    def before(self, step: int) -> None:
        """Start or stop recording at the window's ends."""
        if self.cfg is not None and step - self.first == self.cfg.start and not self.running:  # a rollback may pass here again
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif self.cfg is not None and step - self.first == self.cfg.start + self.cfg.steps:
            self.close()

    def close(self) -> None:
        """Stop recording, if it runs."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
