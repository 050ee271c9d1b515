"""A run's folder: what is written next to the checkpoints, and how a finished run is opened again."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.config import dump, load, schema
from maxtrain.config.errors import Refused
from maxtrain.data.tokenizer import Tokenizer, load_saved
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout
from maxtrain.training import state as states
from maxtrain.training.program import Program, make_program

PACKAGES = ("maxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "tokenizers")
# Keys whose change makes a checkpoint another model's or another optimizer's
BREAKING = (
    "model.",
    "data.tokenizer.",
    "optimizer.kind",
    "precision.params",
    "precision.moments",
    "precision.second_moment",
    "guard.window",
)
HARMLESS = ("model.layers", "model.max_length", "model.init_scale", "model.init_from", "model.ignore_fields")
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


def describe(config: schema.Config, tokenizer: Tokenizer, num_parameters: int) -> None:
    """Write config.yml, manifest.json and the tokenizer into the run's folder."""
    folder = config.run.folder
    with open(os.path.join(folder, "config.yml"), "w") as file:
        file.write(dump(config))
    device = jax.devices()[0]
    manifest = {
        "command": sys.argv,
        "git": git_state(),
        "versions": versions(),
        "flags": {key: os.environ[key] for key in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS") if key in os.environ},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "processes": jax.process_count()},
        "parameters": num_parameters,
    }
    with open(os.path.join(folder, "manifest.json"), "w") as file:
        json.dump(manifest, file, indent=2)
    tokenizer.save(os.path.join(folder, "tokenizer"))


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
    precision = {"second_moment": old["precision"]["params"], **old["precision"]}  # before it had a key of its own
    changed = differences({**old, "precision": precision}, config.model_dump(mode="json"))
    lines = {key: f"{key}: {before!r} in the checkpoint, {after!r} now" for key, (before, after) in changed.items()}
    broken = [line for key, line in lines.items() if f"{key}.".startswith(BREAKING) or key.startswith(BREAKING)]
    broken = [line for line in broken if not line.startswith(HARMLESS)]
    if broken:
        raise Refused(
            f"{config.run.folder}: its checkpoints belong to another model:\n  "
            + "\n  ".join(broken)
            + "\nuse another run.dir, or undo the change"
        )
    return [line for key, line in lines.items() if not key.startswith(("run.", "metrics."))]


def is_run(path: str) -> bool:
    """Whether `path` is a run's folder or one of its checkpoints."""
    return os.path.isfile(os.path.join(locate(path)[0], "config.yml"))


def locate(path: str) -> tuple[str, int | None]:
    """The run's folder and the step that `path` names: a run's folder (no step), or `<run>/checkpoints/<step>`."""
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
    return load(os.path.join(folder, "config.yml"), (f"run.dir={folder}", *alone, *overrides)).config


def restore_model(path: str, config: schema.Config, like: Any, report: Any = print) -> tuple[Any, int]:
    """The model of a run's newest good checkpoint, or of the one that `path` names, laid out as `like` describes; and its step.

    Raises:
        Refused: there is no good checkpoint, or the one that is named is damaged.
    """
    folder, step = locate(path)
    with Checkpointer(os.path.join(folder, "checkpoints"), config.checkpoint) as checkpointer:
        if step is None:
            step = checkpointer.newest_good(report)
            if step is None:
                raise Refused(f"{folder}: no good checkpoint is here; train first")
        else:
            checkpointer.verify(step)
        wanted = {"model": like}
        return states.unstack(checkpointer.restore(step, states.stack(wanted), partial=True), wanted)["model"], step


def open_mesh(config: schema.Config) -> jax.sharding.Mesh:
    """The mesh of a config on the devices of this process."""
    mesh.start(config.run, config.mesh)
    return mesh.make_mesh(config.mesh)


def open_program(config: schema.Config) -> Program:
    """The program of a config on the devices of this process."""
    device_mesh = open_mesh(config)
    return make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))


def open_run(path: str, report: Any = print) -> tuple[Program, Tokenizer, Any, int]:
    """The program, tokenizer, model and step of the newest good checkpoint of a run's folder, on the devices of this process.

    `path` may name one checkpoint instead: `<run>/checkpoints/<step>`.

    Raises:
        Refused: the folder is no run, or has no good checkpoint.
    """
    config = read_config(path)
    program = open_program(config)
    model, step = restore_model(path, config, program.state.model, report)
    return program, load_saved(os.path.join(locate(path)[0], "tokenizer")), model, step
