"""A run's folder: what is written next to the checkpoints, and how a finished run is opened again."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from pydantic import ValidationError

from maxtrain.checkpoint.orbax import Checkpointer, newest_meta
from maxtrain.config import dump, load, schema
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.data import integrity
from maxtrain.data.cache import say
from maxtrain.data.tokenizer import Tokenizer, load_saved
from maxtrain.models.families.family import free_keys, function
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout
from maxtrain.training import state as states
from maxtrain.training.program import Program, make_program

PACKAGES = ("maxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "tokenizers")
LOCK = ".lock"
# Written at each start; what is in it is compared with its hashes (integrity.RUN_MANIFEST) before it is used
CONFIG, TOKENIZER = "config.yml", "tokenizer"
NEWEST = "checkpoints.json"  # the newest step that was complete: tells a run whose checkpoints are gone from one that had none yet
# Keys whose change makes a checkpoint another model's or another optimizer's; of the model all that its function depends on.
# (Whether the tokenizer is another one, its fingerprint tells.)
BREAKING = ("model.", "optimizer.kind", "precision.params", "precision.moments", "precision.second_moment", "guard.window")
# A finished run is opened by one process, on whatever devices it has, not on those it was trained on
ALONE = (
    "train.attention=auto",
    "mesh.context_attention=auto",
    "mesh.context_order=auto",
    *(f"mesh.{axis}=1" for axis in mesh.AXES if axis != "fsdp"),
    "mesh.fsdp=-1",
    "mesh.pipeline_microbatches=null",
    "mesh.pipeline_repeats=1",
    "mesh.dcn=!replace {}",
    "mesh.coordinator=null",
    "mesh.num_processes=1",
    "mesh.process_id=null",
)


def versions() -> dict[str, str]:
    """Version of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit of the working directory and whether files differ from it; empty outside a checkout."""

    def ask(*command: str) -> str | None:
        try:
            return subprocess.run(["git", *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = ask("rev-parse", "HEAD")
    return {} if commit is None else {"commit": commit, "changed_files": len((ask("status", "--porcelain") or "").splitlines())}


def describe(config: schema.Config, tokenizer: Tokenizer, num_parameters: int, resumed: bool) -> None:
    """Write config.yml, manifest.json, the tokenizer (a resumed run has it) and the hashes of all these into the run's folder."""
    folder = Path(config.run.folder)
    device = jax.devices()[0]
    manifest = {
        "command": sys.argv,
        "git": git_state(),
        "versions": versions(),
        "flags": {key: os.environ[key] for key in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS") if key in os.environ},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "processes": jax.process_count()},
        "parameters": num_parameters,
    }
    if not (resumed and (folder / TOKENIZER).is_dir()):
        tokenizer.save(folder / TOKENIZER)
    contents = {CONFIG: dump(config).encode(), "manifest.json": json.dumps(manifest, indent=2).encode()}
    integrity.rewrite(folder, contents | tokenizer_files(folder), integrity.RUN_MANIFEST)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Content of the files of a run's tokenizer by their path in the run's folder."""
    files = sorted(path for path in (folder / TOKENIZER).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def check_files(folder: str, report: Callable[[str], None], *, resuming: bool = False) -> None:
    """Return if config.yml and the tokenizer of a run are as they were written; tell `report` what has no hash to compare with.

    `resuming`: the run's trainer asks, which writes anew what is missing.

    Raises:
        Refused: a file has changed.
    """
    place = Path(folder)
    if not (place / integrity.RUN_MANIFEST).exists():
        report(f"{folder}: {CONFIG} and {TOKENIZER} have no hashes yet: they are used as they are" + ", and hashed now" * resuming)
        return
    try:
        kept = [name for name in integrity.read_manifest(place, integrity.RUN_MANIFEST) if name == CONFIG or name.startswith(TOKENIZER)]
    except ValueError:
        kept = None
    lines = integrity.damage(place, integrity.RUN_MANIFEST, only=kept)
    if resuming:
        lines = [line for line in lines if not line.endswith(" is missing")]
    if lines:
        raise Refused(
            f"{folder}: damaged, or edited by hand: {'; '.join(lines)}\n"
            "bring back what was there, or move it away: when the run is trained on, it is written anew from the command's config "
            "(to change a key, give section.key=value on the command line)"
        )
    known = set(kept or ())
    if others := [name for name in tokenizer_files(place) if name not in known]:
        report(f"{folder}: not of the run, and used with its tokenizer: {', '.join(others)}")


class Lock:
    """The lock of a run's folder, held until it is released, or as long as this process lives."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def hold(self) -> None:
        """Take it, if it is not held already; `Refused` when another process trains there."""
        if self._file is not None:
            return
        file = open(os.path.join(self._folder, LOCK), "a+")  # noqa: SIM115 - open for the life of the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise Refused(f"{self._folder}: {holder} trains here: wait for it, stop it, or choose another run.dir") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None


def note_checkpoint(folder: str, step: int) -> None:
    """Remember, outside of the folder of checkpoints, that there is one."""
    integrity.replace(Path(folder, NEWEST), json.dumps({"step": step}).encode())


def check_nothing_lost(folder: str, traces: Sequence[int], told: Sequence[str]) -> None:
    """Return if a run without a good checkpoint never had one: it begins at its beginning.

    Args:
        folder: the run's.
        traces: steps of checkpoints that are, or were, complete.
        told: what is wrong with them.

    Raises:
        Refused: it had one; to begin anew would overwrite what is left.
    """
    place = Path(folder)
    known = (place / NEWEST).exists()
    if traces or known or (not any(place.glob("checkpoints/*")) and _was_saving(place / "metrics.jsonl")):
        raise Refused(
            "".join(f"{line}\n" for line in told) + f"{folder}: no good checkpoint is left (there are steps {list(traces) or 'none'}): "
            "bring them back from a copy, or choose another run.dir to begin anew; nothing was changed"
        )


def _was_saving(metrics: Path) -> bool:
    """Whether metrics.jsonl tells of a checkpoint, though there is no trace of one: for runs of versions that did not note it."""
    with contextlib.suppress(OSError), open(metrics, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("checkpoint_seconds"):
                    return True
    return False


def recorded(config: schema.Config) -> dict[str, Any] | None:
    """What the newest checkpoint of a run says of it: see `Trainer._save`; None where there is none, or none is to be resumed."""
    return newest_meta(Path(config.run.folder, "checkpoints")) if config.checkpoint.resume else None


def own_tokenizer(config: schema.Config) -> Tokenizer | None:
    """The tokenizer in a run's folder, for a run that goes on and whose config asks for the same as when it was begun; else None."""
    known, folder = recorded(config), os.path.join(config.run.folder, TOKENIZER)
    if known is None or not os.path.isdir(folder):
        return None
    before, now = known["config"]["data"]["tokenizer"], config.data.tokenizer.model_dump(mode="json")
    if now not in (before, before | {"path": os.path.abspath(folder)}):  # the second: a folder that was moved
        return None
    tokenizer = load_saved(folder)
    return tokenizer if tokenizer.fingerprint == known["tokenizer"] else None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configs (as JSON), with both values; None where a key is absent."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return {key: (before.get(key), after.get(key)) for key in sorted(before | after) if before.get(key) != after.get(key)}


def check_resume(old: Mapping[str, Any], config: schema.Config) -> list[str]:
    """Differences between a checkpoint's config and this one, a line each, if the run can go on with them.

    Raises:
        Refused: a difference makes the checkpoint's arrays meaningless.
    """
    before = filled(old)
    precision = {**before["precision"], "second_moment": old["precision"].get("second_moment", old["precision"]["params"])}
    changed = differences({**before, "precision": precision}, config.model_dump(mode="json"))
    lines = {key: f"{key}: {before!r} in the checkpoint, {after!r} now" for key, (before, after) in changed.items()}
    broken = [lines[key] for key, values in changed.items() if key.startswith(BREAKING) and not may_change(key, *values)]
    if broken:
        raise Refused(
            f"{config.run.folder}: its checkpoints belong to another model:\n  "
            + "\n  ".join(broken)
            + "\nuse another run.dir, or undo the change"
        )
    return [line for key, line in lines.items() if not key.startswith(("run.", "metrics."))]


def filled(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config with the defaults of keys that did not exist yet."""
    try:
        return schema.Config.model_validate(old).model_dump(mode="json")
    except ValidationError:  # its differences will tell
        return old


def may_change(key: str, before: Any, after: Any) -> bool:
    """Whether a key of the section `model` may have another value when a run goes on: what is no function, and the context's limit."""
    if key == "model.moe.balance_rate":  # how fast the bias moves, not whether there is one
        return before is not None and after is not None
    return key == "model.max_length" or any(key == free or key.startswith(f"{free}.") for free in free_keys())


def is_run(path: str) -> bool:
    """Whether `path` is a run's folder or one of its checkpoints."""
    return os.path.isfile(os.path.join(locate(path)[0], "config.yml"))


def locate(path: str) -> tuple[str, int | None]:
    """The run's folder and the step that `path` names: a run's folder (no step), or `<run>/checkpoints/<step>`."""
    path = expand(path, "the run")
    above, name = os.path.split(os.path.abspath(path))
    if name.isdigit() and os.path.basename(above) == "checkpoints":
        return os.path.dirname(above), int(name)
    return path, None


def read_config(path: str, overrides: Sequence[str] = ()) -> schema.Config:
    """The config of a run for one process, on whatever devices it has unless `overrides` say; `path` as in `locate`.

    Raises:
        Refused: no run is there, or the overrides do not fit.
    """
    folder = locate(path)[0]
    if not os.path.isfile(os.path.join(folder, "config.yml")):
        raise Refused(f"{folder}: no run is here (config.yml is missing)")
    set_anew = {word.partition("=")[0] for word in overrides}
    alone = [word for word in ALONE if word.partition("=")[0] not in set_anew]
    check_files(folder, say)
    return load(os.path.join(folder, "config.yml"), (f"run.dir={folder}", *alone, *overrides)).config


def restore_model(path: str, config: schema.Config, like: Any, tokenizer: Tokenizer | None, report: Any = say) -> tuple[Any, int]:
    """The model of a run's newest good checkpoint, or of the one that `path` names, laid out as `like` describes; and its step.

    Raises:
        Refused: there is no good checkpoint, the one that is named is damaged, or it is of another model or tokenizer.
    """
    folder, step = locate(path)
    with Checkpointer(os.path.join(folder, "checkpoints"), config.checkpoint) as checkpointer:
        if step is None:
            step = checkpointer.newest_good(report)
            if step is None:
                raise Refused(f"{folder}: no good checkpoint is here; train first")
        else:
            checkpointer.verify(step, report)
        _check_belongs(folder, step, checkpointer.read_meta(step), config, tokenizer)
        wanted = {"model": like}
        return states.unstack(checkpointer.restore(step, states.stack(wanted), partial=True), wanted)["model"], step


def _check_belongs(folder: str, step: int, meta: Mapping[str, Any], config: schema.Config, tokenizer: Tokenizer | None) -> None:
    """Refuse to use a checkpoint with the config or the tokenizer of another model, which may fit its arrays."""
    of = f"{folder}: its checkpoint of step {step}"
    model = filled(meta["config"]).get("model")
    try:
        known, now = function(schema.Model.model_validate(model)), function(config.model)
    except ValidationError:
        return  # of a version that knew other keys
    wrong = [f"model.{key}" for key in known | now if known.get(key) != now.get(key) and key != "max_length"]
    if wrong:
        raise Refused(f"{of} is of another model than {CONFIG} describes ({', '.join(wrong)}): bring back the {CONFIG} of the run")
    if tokenizer is not None and meta["tokenizer"] not in (None, tokenizer.fingerprint):
        raise Refused(f"{of} was trained with another tokenizer than {TOKENIZER}/ holds: bring back the run's own")


def open_mesh(config: schema.Config) -> jax.sharding.Mesh:
    """The mesh of a config on the devices of this process."""
    mesh.start(config.run, config.mesh)
    return mesh.make_mesh(config.mesh)


def open_program(config: schema.Config) -> Program:
    """The program of a config on the devices of this process."""
    device_mesh = open_mesh(config)
    return make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))


def open_run(path: str, overrides: Sequence[str] = (), report: Any = say) -> tuple[Program, Tokenizer, Any, int]:
    """The program, tokenizer, model and step of the newest good checkpoint of a run's folder, on the devices of this process.

    `path` may name one checkpoint instead: `<run>/checkpoints/<step>`.

    Raises:
        Refused: the folder is no run, or has no good checkpoint.
    """
    config = read_config(path, overrides)
    tokenizer = load_saved(os.path.join(locate(path)[0], TOKENIZER))
    program = open_program(config)
    model, step = restore_model(path, config, program.state.model, tokenizer, report)
    return program, tokenizer, model, step
