"""Rows that say which tensors of a checkpoint hold which of our parameters, and in what form.

A form is a pair of inverse rearrangements (transpose, split, stack): bits are moved, never computed with, so export after
import gives the same bits. Both directions run on numpy arrays and on jax's tracers alike: shapes come from `jax.eval_shape`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from maxtrain.config import schema

Arrays = Sequence[Any]


class Transform(NamedTuple):
    """Two inverse rearrangements of a list of arrays."""

    load: Callable[[Arrays], Arrays]
    """Their tensors -> our parameters."""
    save: Callable[[Arrays], Arrays]
    """Our parameters -> their tensors."""


@dataclass(frozen=True)
class Form:
    """One way in which a checkpoint keeps a row's parameters."""

    names: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Row:
    """Parameters that are converted together, and the forms they may have: the first is written, all are read."""

    ours: tuple[str, ...]
    """Names below the model, as of an unrolled one: `body/3/layers/0/attention/q`."""
    forms: tuple[Form, ...]

    def shapes(self, form: Form, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Name and shape of the form's tensors, from the shapes of our parameters."""
        return dict(zip(form.names, _saved_shapes(form.transform, tuple(ours[name] for name in self.ours)), strict=True))


@functools.cache
def _saved_shapes(transform: Transform, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    described = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return tuple(array.shape for array in jax.eval_shape(transform.save, described))


def _each(function: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: [function(array) for array in arrays]


def _space(array: Any) -> Any:
    return array.__array_namespace__()


SAME = Transform(lambda arrays: arrays, lambda arrays: arrays)
TRANSPOSED = Transform(_each(lambda a: a.mT), _each(lambda a: a.mT))  # we keep [in, out], they [out, in]


@functools.cache
def fused(sizes: tuple[int, ...], axis: int = 0) -> Transform:
    """Matrices one behind the other along `axis` of their single tensor, ours the transposed parts of `sizes` (qkv, gate_up).

    With `axis=-2`, experts in front: ours [expert, in, size] each, theirs [expert, sum of sizes, in].
    """
    cuts = [sum(sizes[:index]) for index in range(1, len(sizes))]

    def load(arrays: Arrays) -> Arrays:
        whole = arrays[0]
        starts, stops = [0, *cuts], [*cuts, sum(sizes)]
        parts = [_take(whole, axis, start, stop) for start, stop in zip(starts, stops, strict=True)]
        return [part.mT if part.ndim > 1 else part for part in parts]

    def save(arrays: Arrays) -> Arrays:
        return [_space(arrays[0]).concat([a.mT if a.ndim > 1 else a for a in arrays], axis=axis)]

    return Transform(load, save)


def _take(array: Any, axis: int, start: int, stop: int) -> Any:
    index = [slice(None)] * array.ndim
    index[axis] = slice(start, stop)
    return array[tuple(index)]


def _alternate(arrays: Arrays) -> Arrays:
    pair = _space(arrays[0]).stack(arrays, axis=-1)
    return [pair.reshape((*pair.shape[:-2], -1))]


ALTERNATING = Transform(lambda arrays: [arrays[0][..., 0::2], arrays[0][..., 1::2]], _alternate)  # gate, up, gate, up ... (GPT-OSS)


@functools.cache
def per_expert(num_experts: int) -> Transform:
    """A tensor [out, in] for each expert and parameter, all parameters of an expert together; ours are [expert, in, out] each."""

    def load(arrays: Arrays) -> Arrays:
        kinds = len(arrays) // num_experts
        return [_space(arrays[0]).stack([a.mT for a in arrays[index::kinds]]) for index in range(kinds)]

    def save(arrays: Arrays) -> Arrays:
        return [array[expert].mT for expert in range(num_experts) for array in arrays]

    return Transform(load, save)


def same(ours: str, *theirs: str) -> Row:
    """One parameter, one tensor of the same shape; further names are other names of the same."""
    return Row((ours,), tuple(Form((name,), SAME) for name in theirs))


def linear(ours: str, *theirs: str) -> Row:
    """One matrix, one tensor with the dims the other way round; further names are other names of the same."""
    return Row((ours,), tuple(Form((name,), TRANSPOSED) for name in theirs))


def layers(model: schema.Model) -> Iterator[tuple[str, schema.Slot]]:
    """Of every layer, first to last: the beginning of its parameters' names (`body/3/layers/0/`) and its slot."""
    period, first, last = len(model.layer_pattern), len(model.prefix), model.num_layers - len(model.remainder)
    for index, kind in enumerate(model.kinds):
        if index < first:
            path = f"prefix/layers/{index}/"
        elif index < last:
            path = f"body/{(index - first) // period}/layers/{(index - first) % period}/"
        else:
            path = f"remainder/layers/{index - last}/"
        yield path, model.slots[kind]


def ends(model: schema.Model) -> Iterator[Row]:
    """Embedding, last norm and head under the names that nearly all families use."""
    yield same("embedding", "model.embed_tokens.weight")
    yield same("norm/scale", "model.norm.weight")
    if not model.tie_embeddings:
        yield same("head", "lm_head.weight")


def attention(ours: str, theirs: str) -> Iterator[Row]:
    """The four projections of grouped-query attention, a tensor each."""
    for name, tensor in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        yield linear(f"{ours}attention/{name}", f"{theirs}self_attn.{tensor}.weight")


def attention_extras(model: schema.Model, ours: str, theirs: str) -> Iterator[Row]:
    """What some models have besides the projections: their biases, norms of queries and keys, sinks."""
    biases = [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")] * model.qkv_bias + [("out", "o_proj")] * model.out_bias
    for name, tensor in biases:
        yield same(f"{ours}attention/{name}_bias", f"{theirs}self_attn.{tensor}.bias")
    if model.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}attention/{name}/scale", f"{theirs}self_attn.{name}.weight")
    if model.attention_sinks:
        yield same(f"{ours}attention/sinks", f"{theirs}self_attn.sinks")


PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


def fused_attention(model: schema.Model, ours: str, theirs: str) -> Iterator[Row]:
    """Grouped-query attention with queries, keys and values in one tensor (Phi-3)."""
    heads, kv_heads = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    names = tuple(f"{ours}attention/{name}" for name in "qkv")
    yield Row(names, (Form((f"{theirs}self_attn.qkv_proj.weight",), fused((heads, kv_heads, kv_heads))),))
    yield linear(f"{ours}attention/out", f"{theirs}self_attn.o_proj.weight")


def fused_gated(model: schema.Model, ours: str, theirs: str) -> Iterator[Row]:
    """A gated feed-forward with gate and up in one tensor (Phi-3, GLM-4)."""
    names = f"{ours}feed_forward/gate", f"{ours}feed_forward/up"
    yield Row(names, (Form((f"{theirs}mlp.gate_up_proj.weight",), fused((model.mlp, model.mlp))),))
    yield linear(f"{ours}feed_forward/down", f"{theirs}mlp.down_proj.weight")


def dense(norms: Mapping[str, str], *, fused_qkv: bool = False, fused_up: bool = False) -> Callable[[schema.Model], Iterator[Row]]:
    """The rows of models whose layers are attention and a gated feed-forward; `norms` says what their norms are called."""

    def rows(model: schema.Model) -> Iterator[Row]:
        yield from ends(model)
        for index, (ours, _) in enumerate(layers(model)):
            theirs = f"model.layers.{index}."
            for name, tensor in norms.items():
                yield same(f"{ours}{name}/scale", f"{theirs}{tensor}.weight")
            yield from fused_attention(model, ours, theirs) if fused_qkv else attention(ours, theirs)
            yield from attention_extras(model, ours, theirs)
            yield from fused_gated(model, ours, theirs) if fused_up else gated(ours, theirs)

    return rows


def gated(ours: str, theirs: str) -> Iterator[Row]:
    """A gated feed-forward, a tensor for each of its matrices."""
    for name in ("gate", "up", "down"):
        yield linear(f"{ours}feed_forward/{name}", f"{theirs}mlp.{name}_proj.weight")


def experts(model: schema.Model, ours: str, each: str, names: tuple[str, str, str], together: str) -> Iterator[Row]:
    """The routed experts: published with a tensor for each expert and matrix, kept by transformers 5 in two tensors of all experts.

    Args:
        model: the model they belong to.
        ours: beginning of our names, up to the layer.
        each: a published expert's name with `{}` for its number.
        names: what gate, up and down are called below it.
        together: beginning of the names of the tensors of all experts.
    """
    assert model.moe is not None
    count, mlp = model.moe.num_experts, model.moe.mlp
    gate, up, down = names
    both = tuple(f"{each.format(index)}{name}.weight" for index in range(count) for name in (gate, up))
    downs = tuple(f"{each.format(index)}{down}.weight" for index in range(count))
    parts = f"{ours}feed_forward/gate", f"{ours}feed_forward/up"
    yield Row(parts, (Form(both, per_expert(count)), Form((f"{together}gate_up_proj",), fused((mlp, mlp), -2))))
    yield Row((f"{ours}feed_forward/down",), (Form(downs, per_expert(count)), Form((f"{together}down_proj",), TRANSPOSED)))
