"""Models that were trained before, by MaxTrain or by others: opened, converted, and started from.

A path is a run or checkpoint of MaxTrain, a folder in Hugging Face's format or a GGUF file; what is different between them
ends here.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from maxtrain.checkpoint import gguf, huggingface, weights
from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.checkpoint.weights import Weights
from maxtrain.config import dump, load, schema
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.data import integrity
from maxtrain.data.tokenizer import ByteTokenizer, Tokenizer, load_saved
from maxtrain.models.families.family import function
from maxtrain.ops.attention import Context
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout, path_name, stacked_name
from maxtrain.training import run as runs
from maxtrain.training import state as states
from maxtrain.training.program import Program, make_program

IGNORE = "model.ignore_fields="
STDLIB = {"kind": "stdlib", "split": "heldout", "max_bytes": 200_000}


class Source(Protocol):
    """A trained model at a path; opening it reads no weights."""

    model: schema.Model
    tokenizer: Tokenizer | None
    config: schema.Config

    step: int | None
    """The checkpoint's, once it is loaded; None for what is not MaxTrain's."""

    def load(self, like: Any) -> Any:
        """The model, laid out and in the formats that the abstract `like` describes."""

    def save_tokenizer(self, folder: str) -> bool:
        """Write the tokenizer's files; False where there is none."""


class RunSource:
    """A run of MaxTrain, or one of its checkpoints."""

    def __init__(self, path: str, overrides: Sequence[str] = ()) -> None:
        self.path, self.config = path, runs.read_config(path, overrides)
        self.step: int | None = None
        self.model = self.config.model
        self.folder = os.path.join(runs.locate(path)[0], "tokenizer")
        self.tokenizer = load_saved(self.folder) if os.path.isdir(self.folder) else None

    def load(self, like: Any) -> Any:
        """Through the format it was saved in."""
        saved = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, self.config.precision.params, sharding=s.sharding), like)
        model, self.step = runs.restore_model(self.path, self.config, saved, self.tokenizer)
        return jax.tree.map(lambda array, spec: array.astype(spec.dtype), model, like)

    def save_tokenizer(self, folder: str) -> bool:
        """Copy its files."""
        return huggingface.copy_tokenizer(self.folder, folder)


class ForeignSource:
    """A folder in Hugging Face's format or a GGUF file."""

    def __init__(self, found: Weights, overrides: Sequence[str] = ()) -> None:
        self.weights, self.model = found, found.model
        self.step: int | None = None
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = load_saved(folder) if found.save_tokenizer(folder) else None
        self.config = foreign_config(found.model, overrides)

    def load(self, like: Any) -> Any:
        """Tensor by tensor."""
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        arrays = weights.load(self.weights, {path_name(path): leaf for path, leaf in paths})
        return jax.tree.unflatten(tree, [arrays[path_name(path)] for path, _ in paths])

    def save_tokenizer(self, folder: str) -> bool:
        """Write what the file or folder has."""
        return self.weights.save_tokenizer(folder)


def foreign_config(model: schema.Model, overrides: Sequence[str] = (), tokenizer: str = "tokenizer") -> schema.Config:
    """A config around an imported model, with the standard library's held-out files to evaluate it on.

    Raises:
        Refused: the overrides are no config, or change what the model computes.
    """
    length = min(1024, model.max_length)
    data = {"length": length, "batch_size": 8, "tokenizer": {"kind": "huggingface", "path": tokenizer}}
    config = schema.Config.model_validate({"model": model, "data": data, "eval": {"sets": {"stdlib": STDLIB}}})
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "imported.yml")
        Path(path).write_text(dump(config))
        config = load(path, overrides).config
    before, after = function(model), function(config.model)
    changed = [f"model.{key}" for key in before if before[key] != after[key] and key != "max_length"]
    if changed:
        raise Refused(f"{', '.join(changed)}: an imported model computes what it was trained to: remove this from the command line")
    return config


def ignored_fields(overrides: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """What overrides set `model.ignore_fields` to, and the other overrides; `Refused` where it is no list of names."""
    mine = [word for word in overrides if word.startswith(IGNORE)]
    ignore = load(None, [*mine, "model.init_from=it"]).config.model.ignore_fields if mine else ()
    return ignore, [word for word in overrides if word not in mine]


def foreign(path: str, ignore: Sequence[str] = ()) -> Weights:
    """The weights at a path that is no run of MaxTrain, read without the fields to ignore.

    Raises:
        Refused: nothing that can be imported is there; with the reason where it is known.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise Refused(f"{path}: neither a run of MaxTrain (config.yml) nor a model of Hugging Face (config.json) is here")
        return huggingface.Folder(path, ignore)
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such file or folder")
    return gguf.File(path, ignore)


def open_source(path: str, overrides: Sequence[str] = (), key: str = "the model") -> Source:
    """What is at a path, with its config changed by `overrides`; `Refused` if it is no trained model or one that is not supported.

    `key` says where the path was written, for a message about the path itself.
    """
    path = expand(path, key)
    ignore, overrides = ignored_fields(overrides)
    if not runs.is_run(path):
        return ForeignSource(foreign(path, ignore), overrides)
    if ignore:
        raise Refused(f"{path}: this is a run of MaxTrain, on which model.ignore_fields has no effect: remove it")
    return RunSource(path, overrides)


# ------------------------------------------------------------------------------------------------------------ using


@dataclass(frozen=True)
class Pretrained:
    """A model in memory; calling it gives logits."""

    config: schema.Config
    tokenizer: Tokenizer | None
    model: Any
    """The decoder, a pytree of its parameters."""

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits float32 [batch, length, vocab] of tokens int32 [batch, length]; each row is one document from its beginning.

        Raises:
            ValueError: tokens are not [batch, length], not integers, or out of the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers [batch, length], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.config.model.vocab_size):
            raise ValueError(f"tokens must be from 0 to {self.config.model.vocab_size - 1}; found {tokens.min()} to {tokens.max()}")
        return _logits(self.model, tokens.astype(np.int32))


@jax.jit
def _logits(model: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.logits(model(tokens, Context(positions, jnp.ones_like(positions))).hidden)


def load_pretrained(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Pretrained:
    """The model at a path, on the devices of this process, its config changed by `overrides`; `Refused` if there is none."""
    source = open_source(os.fspath(path), overrides)
    program = runs.open_program(source.config)
    return Pretrained(program.config, source.tokenizer, source.load(program.state.model))


def open_for_serving(path: str, overrides: Sequence[str] = (), serve: Mapping[str, Any] | None = None) -> tuple[Program, Source]:
    """The model at a path as an engine wants it, layers apart on CPU and weights in the format they are multiplied in; none are read yet.

    Args:
        path: as in `load_pretrained`.
        overrides: `section.key=value` of the sections serve, mesh and precision, and `model.ignore_fields`.
        serve: keys of the section serve.

    Raises:
        Refused: there is no model, or a key is unknown or has nothing to do with serving.
    """
    foreign_keys = [word for word in overrides if not word.startswith(("serve.", "mesh.", "precision.", IGNORE))]
    if foreign_keys:
        raise Refused(f"{foreign_keys[0]}: a trained model is served as it is; set serve, mesh, precision or model.ignore_fields")
    source = open_source(path, overrides)
    config, layers = source.config, source.config.model.model_copy(update={"layers": "auto"})
    if serve:
        try:
            chosen = schema.Serve.model_validate(config.serve.model_dump() | dict(serve))
        except ValidationError as error:
            raise Refused("\n".join(f"serve.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())) from None
        config = config.model_copy(update={"serve": chosen})
    device_mesh = runs.open_mesh(config)
    config = mesh.resolve(config.model_copy(update={"model": layers}), device_mesh)
    precision = config.precision.model_copy(update={"params": config.precision.compute})
    return make_program(config.model_copy(update={"precision": precision}), Layout(device_mesh, config.mesh.rules)), source


# ------------------------------------------------------------------------------------------------------- converting


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A folder to fill, which takes the name `path` when all has gone well and is removed otherwise.

    Raises:
        Refused: something is there already.
    """
    path = os.path.abspath(expand(path, "OUT"))
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise Refused(f"{path}: something is there already: choose another place or remove it")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        yield draft
        os.chmod(draft, 0o777 & ~_umask())
        os.rename(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def import_model(found: Weights, out: str, overrides: Sequence[str] = ()) -> schema.Config:
    """Write a run's folder with one checkpoint, of step 0, that holds the model alone.

    Raises:
        Refused: weights and config do not fit together, or `out` is taken; nothing is left behind then.
    """
    weights.check(found)
    with new_folder(out) as draft:
        tokenizer = found.save_tokenizer(os.path.join(draft, "tokenizer"))
        config = foreign_config(found.model, overrides, os.path.join(os.path.abspath(expand(out, "OUT")), "tokenizer"))
        program = runs.open_program(config)
        described = states.stack({"model": program.state.model})
        leaves, tree = jax.tree_util.tree_flatten_with_path(described["model"])
        arrays = weights.load(found, {path_name(path): leaf for path, leaf in leaves})
        loaded = {"model": jax.tree.unflatten(tree, [arrays.pop(path_name(path)) for path, _ in leaves])}
        meta = {
            "step": 0,
            "imported": {"from": os.path.basename(found.place), "family": found.family.model_type},
            "config": program.config.model_dump(mode="json"),
            "tokenizer": load_saved(os.path.join(draft, "tokenizer")).fingerprint if tokenizer else None,
            "versions": runs.versions(),
        }
        with Checkpointer(os.path.join(draft, "checkpoints"), config.checkpoint) as checkpointer:
            checkpointer.save(0, loaded, meta)
            checkpointer.wait()
        contents = {runs.CONFIG: dump(config).encode()} | runs.tokenizer_files(Path(draft))
        integrity.rewrite(Path(draft), contents, integrity.RUN_MANIFEST)
    return config


def export_model(
    path: str, out: str, *, family: str | None = None, dtype: str | None = None, around: huggingface.Folder | None = None
) -> Mapping[str, Any]:
    """Write a run's model as a folder in Hugging Face's format; returns its config.json.

    Args:
        path: the run or one of its checkpoints.
        out: the folder to make.
        family: model type to write; the first that describes the model when None.
        dtype: format of the weights; the one they are kept in when None.
        around: a folder in which this language model is a part; all else in it is written too, as it is.

    Raises:
        Refused: no family of Hugging Face describes the model, or `out` is taken.
    """
    source = RunSource(path)
    program = runs.open_program(source.config)
    with new_folder(out) as draft:
        flat = {path_name(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(source.load(program.state.model))[0]}

        def read(name: str) -> jax.Array:
            stack, index = stacked_name(name)
            return flat[name] if name in flat else flat[stack][index]

        kept = source.config.precision.params
        config = huggingface.write(draft, source.model, read, dtype=dtype or kept, family=family, around=around)
        if source.save_tokenizer(draft) and source.tokenizer is not None:
            ends = sorted(source.tokenizer.end_ids)
            config |= {"bos_token_id": source.tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
            Path(draft, "config.json").write_text(json.dumps(config, indent=2))
    return config


# ---------------------------------------------------------------------------------------------------- starting from


def settle(config: schema.Config, save: bool = True) -> tuple[schema.Config, Source | None]:
    """The config with what it leaves to the config and tokenizer of `model.init_from`, and that source; unchanged without one.

    With `save` a tokenizer that is taken from there is written into the run's folder, which the config then names. A run that has a
    checkpoint has all of this in its own folder: its source is not opened, and None.

    Raises:
        Refused: the path is no model, or the config sets what is not its model's.
    """
    path = config.model.init_from
    if path is None:
        return config, None
    if (known := runs.recorded(config)) is not None:
        return _as_before(config, schema.Config.model_validate(known["config"])), None
    ignore = [f"{IGNORE}{json.dumps(config.model.ignore_fields)}"] if config.model.ignore_fields else []
    source = open_source(path, ignore, "model.init_from")
    update: dict[str, Any] = {}
    if config.model.deferred:
        kept = {name: getattr(config.model, name) for name in ("init_from", "ignore_fields", "layers")}
        update["model"] = source.model.model_copy(update=kept | {"init_scale": 1.0})
    own, theirs = function(config.model), function(source.model)
    wrong = [] if update else [key for key in own | theirs if own.get(key) != theirs.get(key) and key != "max_length"]
    if wrong:
        lines = [f"  {key}: {own.get(key)!r:.100} here, {theirs.get(key)!r:.100} in {path}" for key in wrong]
        raise Refused(
            "model.init_from: the section model describes another model than the one to start from:\n"
            + "\n".join(lines)
            + "\nremove the section's other keys, and it is taken from there"
        )
    if source.tokenizer is not None and not isinstance(source.tokenizer, ByteTokenizer) and not config.data.tokenizer.changed and save:
        folder = os.path.join(config.run.folder, "tokenizer")
        source.tokenizer.save(folder)
        update["data"] = _with_tokenizer(config.data, folder)
    return _merged(config, update), source


def _as_before(config: schema.Config, before: schema.Config) -> schema.Config:
    """The config of a run that goes on, with the model and the tokenizer that it was begun with where it leaves them to its source."""
    update: dict[str, Any] = {}
    if config.model.deferred:
        update["model"] = before.model.model_copy(update={"init_from": config.model.init_from, "layers": config.model.layers})
    if before.data.tokenizer.kind == "huggingface" and not config.data.tokenizer.changed:
        update["data"] = _with_tokenizer(config.data, os.path.join(config.run.folder, runs.TOKENIZER))
    return _merged(config, update)


def _with_tokenizer(data: schema.Data, folder: str) -> schema.Data:
    return data.model_copy(update={"tokenizer": schema.Tokenizer(kind="huggingface", path=os.path.abspath(folder))})


def _merged(config: schema.Config, update: dict[str, Any]) -> schema.Config:
    """The config with other sections, checked as a whole."""
    try:
        return schema.Config.model_validate(config.model_copy(update=update).model_dump())
    except ValidationError as error:
        place = config.model.init_from
        raise Refused("\n".join(f"with the model of {place}: {item['msg']}" for item in error.errors())) from None


def check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse to go on training a model with another tokenizer than its own."""
    if source.tokenizer is not None and source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise Refused(
            "data.tokenizer is not the tokenizer of the model in model.init_from, so its token ids would mean other words: "
            "remove data.tokenizer, and the model's own is taken"
        )
