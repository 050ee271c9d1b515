"""Settings that are valid and yet change nothing, because of what another one says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maxtrain.config import keys
from maxtrain.config.schema import Config, Mesh, Model
from maxtrain.config.section import Section


def without_effect(config: Config) -> list[str]:
    """A sentence for each key that differs from its default and has no effect in this config, in the order of the sections.

    Such a key is no error: a layer sets it for runs of which this one is an exception, such as `checkpoint.every=500` below
    `train.steps=100`. What contradicts another key is refused by the sections themselves.
    """
    found = [*_model(config.model), *_mesh(config.mesh), *_data(config), *_training(config), *_evaluation(config), *_metrics(config)]
    return [f"{key}={_value(config, key)} has no effect: {reason}" for key, reason in found if _is_changed(config, key)]


def _parent(config: Config, key: str) -> tuple[Any, str]:
    *sections, name = key.split(".")
    value: Any = config
    for section in sections:
        value = value[section] if isinstance(value, dict) else getattr(value, section)
    return value, name


def _value(config: Config, key: str) -> Any:
    value, name = _parent(config, key)
    value = value[name] if isinstance(value, dict) else getattr(value, name)
    return "(...)" if isinstance(value, Section | dict) else list(value) if isinstance(value, tuple) else value


def _is_changed(config: Config, key: str) -> bool:
    value, name = _parent(config, key)
    default = getattr(keys.at(key.rpartition(".")[0]), "default", None)
    return value[name] != (default or {}).get(name) if isinstance(value, dict) else name in value.changed


def _model(model: Model) -> Iterator[tuple[str, str]]:
    if model.deferred:
        return
    used = {name: model.slots[name] for name in model.trained_kinds}
    if all(slot.feed_forward == "moe" for slot in used.values()):
        yield "model.mlp", "every layer has experts, whose width is model.moe.mlp"
    if all(slot.rope is not None or not slot.rotary for slot in used.values()):
        yield "model.rope", "every kind of layer in use has its own rope or none"
    for name in model.slots:
        if name not in used:
            yield f"model.slots.{name}", f"none of the {model.num_layers} layers is of this kind"


def _mesh(mesh: Mesh) -> Iterator[tuple[str, str]]:
    if mesh.num_processes == 1:
        yield "mesh.process_id", "mesh.num_processes is 1"
    for name, axes in mesh.rules.items():
        if axes and all(getattr(mesh, axis) * mesh.dcn.get(axis, 1) == 1 for axis in axes):
            yield f"mesh.rules.{name}", f"{' and '.join(axes)} {'have' if len(axes) > 1 else 'has'} one device"


def _data(config: Config) -> Iterator[tuple[str, str]]:
    data = config.data
    if data.tokenizer.kind != "bpe":
        yield "data.tokenizer.train_bytes", f"kind: {data.tokenizer.kind} is not trained"
    if len(data.sources) == 1:
        yield f"data.sources.{next(iter(data.sources))}.weight", "there is one source"


def _training(config: Config) -> Iterator[tuple[str, str]]:
    steps, checkpoint = config.train.steps, config.checkpoint
    if config.train.loss_chunk > config.data.length:
        yield "train.loss_chunk", f"sequences have {config.data.length} tokens"
    if not config.optimizer.weight_decay:
        yield "optimizer.decay", "optimizer.weight_decay is 0"
    if not config.optimizer.decay:
        yield "optimizer.weight_decay", "optimizer.decay names no kind of parameters"
    if config.guard.spike_sigmas is None:
        yield "guard.window", "guard.spike_sigmas is null"
    if checkpoint.every and checkpoint.every > steps:
        yield "checkpoint.every", f"the run ends at step {steps}, where it saves anyway"
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every and steps % checkpoint.keep_every:
        yield "checkpoint.keep_every", f"no multiple of checkpoint.every={checkpoint.every}: few of these steps, or none, are saved"


def _evaluation(config: Config) -> Iterator[tuple[str, str]]:
    if not config.eval.sets:
        for name in ("batch_size", "length", "stride"):
            yield f"eval.{name}", "eval.sets is empty"
    if config.eval.every and config.eval.every > config.train.steps:
        yield "eval.every", f"the run ends at step {config.train.steps}, where it evaluates anyway"
    if config.serve.draft == "mtp" and not config.model.deferred and config.model.mtp is None:
        yield "serve.draft", "model.mtp is null, so the engine would refuse it"


def _metrics(config: Config) -> Iterator[tuple[str, str]]:
    metrics = config.metrics
    if "console" not in metrics.sinks:
        yield "metrics.console_every", "metrics.sinks has no console"
    if metrics.profile is not None and metrics.profile.start >= config.train.steps:
        yield "metrics.profile", f"it starts at step {metrics.profile.start}, the run ends at step {config.train.steps}"
