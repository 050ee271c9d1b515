"""Rows that say which tensors of a checkpoint hold which of our parameters, and in what form.

A form is a pair of inverse rearrangements (transpose, split, stack): bits are moved, never computed with, so export after
import gives the same bits. Both directions run on numpy arrays and on jax's tracers alike: shapes come from `jax.eval_shape`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

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
    copies: tuple[str, ...] = ()
    """Further tensors, equal to the single one of a form: written, and compared with it where they are there."""

    def shapes(self, form: Form, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Name and shape of the form's tensors and of their copies, from the shapes of our parameters."""
        found = dict(zip(form.names, _saved_shapes(form.transform, tuple(ours[name] for name in self.ours)), strict=True))
        return found | dict.fromkeys(self.copies, found[form.names[0]])


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


def same(ours: str, *theirs: str, copies: Sequence[str] = ()) -> Row:
    """One parameter, one tensor of the same shape; further names are other names of the same, `copies` repeat it."""
    return Row((ours,), tuple(Form((name,), SAME) for name in theirs), tuple(copies))


def linear(ours: str, *theirs: str) -> Row:
    """One matrix, one tensor with the dims the other way round; further names are other names of the same."""
    return Row((ours,), tuple(Form((name,), TRANSPOSED) for name in theirs))
