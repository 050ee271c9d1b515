"""Asynchronous, verified checkpoints: arrays through Orbax, beside them a record (JSON) and, last, the manifest.

A checkpoint is written in `<step>.new` and counts from the moment its manifest exists; then it takes the name `<step>`
and older ones may go. So at every moment, whatever is killed, the last complete checkpoint is still there.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data.integrity import MANIFEST, damage, set_aside, strangers, write_manifest

ARRAYS, RECORD, NEW, REMOVED = "arrays", "record.json", ".new", ".removed"

# Orbax tells its progress at INFO and prints every error three times with a traceback before we raise it.
logging.getLogger("absl").addFilter(lambda record: record.levelno == logging.WARNING or "/orbax/" not in record.pathname)


class Checkpointer:
    """The checkpoints of a run in one folder of a local or shared file system.

    In a run of several processes all of them make the same calls, but for `read_meta`, `steps` and `close`; process 0
    writes the manifest, verifies, reports and deletes. Errors of a write in the background are raised by the next call.
    """

    def __init__(self, directory: str, cfg: schema.Checkpoint, completed: Callable[[int], None] = lambda step: None) -> None:
        """Nothing is read or changed yet, so that a run that is still training can be looked at from outside.

        `completed` is called by process 0, in the background, with each step that has become a complete checkpoint.

        Raises:
            Refused: `directory` is not a path of a file system.
        """
        if "://" in directory:
            raise Refused(f"checkpoints cannot be kept in {directory}: name a folder of a local or shared file system")
        self._root = Path(directory).absolute()
        self._cfg, self._completed = cfg, completed
        self._primary = jax.process_index() == 0
        # Compressing floats saves 8% of the space and costs five times the CPU time, which training needs.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first; they may still turn out to be damaged."""
        return sorted(step for step, folder in folders(self._root).items() if (folder / MANIFEST).exists())

    def traces(self) -> list[int]:
        """Steps of which there is, or was, a complete checkpoint: all folders but those of writes that were cut short."""
        return sorted(step for step, folder in folders(self._root).items() if folder.suffix != NEW or (folder / MANIFEST).exists())

    def save(self, step: int, arrays: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Copy `arrays` (nested dicts of jax.Array) to the host and write them in the background; replaces what `step` had.

        `meta` is anything JSON can hold; `metrics` are what `checkpoint.best` may choose by.

        Raises:
            OSError: this checkpoint cannot be begun, or the one before was not saved; the message names the step.
        """
        self.wait()
        folder = self._root / f"{step}{NEW}"
        values = {name: float(value) for name, value in (metrics or {}).items()}
        record = json.dumps({"step": step, "metrics": values, "meta": dict(meta)}, indent=1)
        try:
            if self._primary:
                self._settle()
                folder.mkdir(parents=True)
                (folder / RECORD).write_text(record)
            self._orbax.save(folder / ARRAYS, args=ocp.args.PyTreeSave(arrays))
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = step, self._worker.submit(self._finish, step, folder)

    def wait(self) -> None:
        """Return when all that was saved is complete, in every process.

        Raises:
            OSError: a checkpoint was not saved; the message names the step and what went wrong.
        """
        self._join()
        ocp.multihost.sync_global_processes("checkpoint")

    def close(self) -> None:
        """Finish what is being written and stop. Does not wait for other processes, which may have died."""
        try:
            self._join()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def newest_good(self, report: Callable[[str], None], before: int | None = None) -> int | None:
        """The newest step (before `before`) whose every byte is as written, the same in all processes; None if there is none.

        What is wrong with newer ones is told to `report` (of process 0), one line a checkpoint; the next complete
        checkpoint has them renamed. Files in the good one that are not its own are told too.
        """
        self.wait()
        good = -1
        for step, folder in sorted(folders(self._root).items(), reverse=True) if self._primary else ():
            if before is not None and step >= before:
                continue
            lines = damage(folder)
            if not lines:
                good = step
                _tell_strangers(folder, report)
                break
            self._damaged.add(step)
            more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
            report(f"skipping the checkpoint {folder}: {'; '.join(lines[:5])}{more}")
        good = int(ocp.multihost.broadcast_one_to_all(np.int32(good)))
        return None if good < 0 else good

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they led to where a run could not go on, and it goes on from `step`."""
        self.wait()
        for other, folder in folders(self._root).items() if self._primary else ():
            if other > step:
                _remove(folder)

    def verify(self, step: int, report: Callable[[str], None]) -> None:
        """Return if every byte of `step` is as written; `Refused` otherwise. For one process."""
        lines = damage(self._folder(step))
        if lines:
            raise Refused(f"the checkpoint {self._folder(step)} is damaged: {'; '.join(lines[:5])}: take another step")
        _tell_strangers(self._folder(step), report)

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` that `step` was saved with."""
        return json.loads((self._folder(step) / RECORD).read_bytes())["meta"]

    def restore(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """The arrays of `step`, placed as `abstract` (nested dicts of jax.ShapeDtypeStruct with shardings) says.

        With `partial` the checkpoint may hold more than is asked for: the model without its optimizer.

        Mesh and number of devices may differ from those it was saved on. Only for a step from `newest_good`:
        nothing is verified here.

        Raises:
            Refused: there is no such step, or names, shapes or formats of the arrays differ.
        """
        self.wait()
        folder = self._folder(step)
        _check_fit(folder, self._orbax.metadata(folder / ARRAYS).item_metadata.tree, abstract, partial)
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._orbax.restore(folder / ARRAYS, args=ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=partial))

    # ---------------------------------------------------------------------------------------------- behind the scenes

    def _folder(self, step: int) -> Path:
        if step not in self.steps():
            raise Refused(f"there is no complete checkpoint of step {step} in {self._root}: it has {self.steps() or 'none'}")
        return folders(self._root)[step]

    def _join(self) -> None:
        if self._pending is None:
            return
        (step, write), self._pending = self._pending, None
        error = write.exception()
        if error is not None:
            raise self._failure(step, error) from error

    def _failure(self, step: int, error: BaseException) -> OSError:
        complete = self.steps() or "none"
        return OSError(f"saving the checkpoint of step {step} in {self._root} failed: {error}\nComplete and untouched: steps {complete}")

    def _finish(self, step: int, folder: Path) -> None:
        """What is left to do in the background after the device-to-host copy."""
        self._orbax.wait_until_finished()
        if self._primary:
            write_manifest(folder)
            self._settle()
            self._damaged.discard(step)
            self._completed(step)
            self._retain(step)

    def _settle(self) -> None:
        """Rename complete `.new` folders to their final name and remove those that an interrupted write or removal left."""
        for folder in self._root.glob(f"[0-9]*{REMOVED}"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._root.glob(f"[0-9]*{NEW}"):
            if (folder / MANIFEST).exists():
                final = folder.with_suffix("")
                self._clear(int(final.name), final)
                folder.rename(final)
            else:
                _remove(folder)

    def _clear(self, step: int, folder: Path) -> None:
        """Make the name of a checkpoint free: what is damaged may still be worth something, so it is not removed."""
        if step not in self._damaged:
            _remove(folder)
        elif folder.exists():
            set_aside(folder)

    def _retain(self, step: int) -> None:
        """Remove what is no longer to be kept and rename what is damaged, now that `step` is complete.

        Steps after it stay unless damaged: they do not belong to what led to `step`, and must not push it out either.
        """
        good = [other for other in self.steps() if other not in self._damaged]
        past = [other for other in good if other <= step]
        kept = {*past[-self._cfg.keep_last :], *good[len(past) :]}
        if self._cfg.keep_every is not None:
            kept |= {other for other in past if other % self._cfg.keep_every == 0}
        best = min(past, key=self._metric)
        if self._metric(best) < math.inf:
            kept.add(best)
        for other, folder in folders(self._root).items():
            if other not in kept:
                self._clear(other, folder)
        self._damaged.clear()

    def _metric(self, step: int) -> float:
        """Value of the metric `best`, infinite if the checkpoint has none; read from disk, so a resumed run knows it too."""
        try:
            value = float(json.loads((self._folder(step) / RECORD).read_bytes())["metrics"][self._cfg.best])
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf
        return math.inf if math.isnan(value) else value


def folders(root: Path) -> dict[int, Path]:
    """The folder of every step, complete or not. A replacement counts from its manifest on, even before it is renamed."""
    found: dict[int, Path] = {}
    for folder in sorted(root.glob("*")):  # so `20` comes before `20.new`
        match = re.fullmatch(rf"(\d+)({re.escape(NEW)})?", folder.name)
        if match and (int(match[1]) not in found or (folder / MANIFEST).exists()):
            found[int(match[1])] = folder
    return found


def newest_meta(root: Path) -> dict[str, Any] | None:
    """The `meta` of the newest step whose record is as written, its arrays unread; None if there is none."""
    for _, folder in sorted(folders(root).items(), reverse=True):
        if not damage(folder, only=[RECORD]):
            return json.loads((folder / RECORD).read_bytes())["meta"]
    return None


def _tell_strangers(folder: Path, report: Callable[[str], None]) -> None:
    if others := strangers(folder):
        report(f"not of the checkpoint {folder}, and left alone: {', '.join(others[:5])}{' ...' if others[5:] else ''}")


def _remove(folder: Path) -> None:
    """Renamed first, so that half removed it is no checkpoint. What a reader on NFS holds open goes after the next checkpoint."""
    if not folder.exists():
        return
    removed = folder.with_name(folder.name.partition(".")[0] + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    try:
        folder.rename(removed)
    except OSError:  # the other one still holds files that are open elsewhere
        removed = folder
    (removed / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(removed, ignore_errors=True)


def _check_fit(folder: Path, saved: Any, wanted: Any, partial: bool) -> None:
    """Refuse unless the arrays of both trees have the same names, shapes and formats; Orbax casts without a word."""
    has, needs = _describe(saved), _describe(wanted)
    differing = [name for name in sorted(needs if partial else has | needs) if has.get(name) != needs.get(name)]
    if not differing:
        return
    lines = [f"  {name}: {has.get(name, 'absent')} in the checkpoint, {needs.get(name, 'absent')} in this run" for name in differing[:10]]
    if len(differing) > 10:
        lines.append(f"  and {len(differing) - 10} more")
    raise Refused(
        f"the checkpoint {folder} does not fit this run, {len(differing)} of its arrays differ:\n"
        + "\n".join(lines)
        + "\nSet model and optimizer to what it was saved with, or choose another run.dir."
    )


def _describe(tree: Any) -> dict[str, str]:
    """Format and shape of every array by its name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves}
