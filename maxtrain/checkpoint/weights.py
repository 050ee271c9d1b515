"""Weights of others, whatever the file they come from: checked against the family's table by name and shape, then moved
tensor by tensor into their shards; and the same way out."""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models import families
from maxtrain.models.decoder import Decoder
from maxtrain.models.families import Family, Form, Row
from maxtrain.models.families.rows import EMBEDDING, HEAD
from maxtrain.parallel.sharding import parameter_table, stacked_name


class Weights(Protocol):
    """A model in a file or folder of others: what is needed to import it."""

    place: str
    """What messages call it."""
    family: Family
    model: schema.Model
    """The section of the config that its own config amounts to."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor by the name it has in Hugging Face's format."""

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised if need be, in a floating-point format."""

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers."""

    def save_tokenizer(self, folder: str) -> bool:
        """Write tokenizer and chat template in Hugging Face's format; False where there is none."""


def parameter_shapes(model: schema.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of an unrolled model."""
    described = Decoder(model.model_copy(update={"layers": "unroll"}), schema.Precision(compute="float32"), schema.Remat())
    return {name: parameter.shape for name, parameter in parameter_table(described).items()}


def check_counts(model: schema.Model, shapes: Collection[tuple[int, ...]], place: str) -> None:
    """Refuse a model with more layers or experts than tensors of these shapes could hold, before they are written out one by one."""
    layers = model.num_layers + (model.mtp.num_layers if model.mtp else 0)
    if layers > len(shapes) + bool(model.mtp):  # the weights of one predictor may be absent
        raise Refused(f"{place}: its config makes {layers:,} layers, and it has {len(shapes):,} tensors only: take both of one model")
    experts = model.moe.num_experts if model.moe else None
    if experts is not None and not any(experts in shape for shape in shapes):  # the router's at least
        raise Refused(f"{place}: its config makes {experts:,} experts, and no tensor has as many rows: take both of one model")


def check(weights: Weights) -> list[tuple[Row, Form]]:
    """The rows of the table with the form each has in these weights.

    Raises:
        Refused: a tensor is missing, is too much or has another shape than the config says.
    """
    rows, ours = list(weights.family.rows(weights.model)), parameter_shapes(weights.model)
    covered = [name for row in rows for name in row.ours]
    assert sorted(covered) == sorted(ours), f"the table of {weights.family.model_type} misses {set(ours) ^ set(covered)}"
    chosen = [(row, families.choose(row, weights.shapes)) for row in rows]
    expected = {name: shape for row, form in chosen for name, shape in row.shapes(form, ours).items()}
    optional = {name for row, _ in chosen for name in row.copies}
    missing = [name for name in expected if name not in weights.shapes and name not in optional]
    problems = [f"{name} {list(expected[name])} is missing" for name in missing]
    for name, shape in weights.shapes.items():
        if name in expected and shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, the config makes it {list(expected[name])}")
        elif name not in expected and not _surplus(weights, name):
            problems.append(f"{name} {list(shape)} belongs to no parameter of this model")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise Refused(
            f"{weights.place}: its tensors are not those of its config:\n  " + "\n  ".join(problems[:10]) + more + "\n"
            "take the config and the weights of one and the same model"
        )
    return chosen


def _surplus(weights: Weights, name: str) -> bool:
    """Whether a tensor holds nothing that is not elsewhere: a tied head that is the embedding, a saved buffer."""
    repeated = weights.model.tie_embeddings and name == HEAD and weights.shapes[name] == weights.shapes.get(EMBEDDING)
    return repeated or any(re.fullmatch(pattern, name) for pattern in weights.family.surplus)


def untied(weights: Weights) -> bool:
    """Whether a model whose config says that head and embedding are one has two that differ; both are read then, a part at a time."""
    there = weights.model.tie_embeddings and weights.shapes.get(HEAD) == weights.shapes.get(EMBEDDING) is not None
    return there and not weights.equal(HEAD, EMBEDDING)


def load(weights: Weights, described: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters, each in the format and the shards that `described` (name below the model -> description) gives.

    Layers may be described one by one or stacked. The host holds the tensors of one row at a time.

    Raises:
        Refused: names or shapes do not fit, and nothing has been read then; or what the table calls a copy is none.
    """
    chosen, arrays = check(weights), dict[str, jax.Array]()
    for row, form in chosen:
        for name, value in zip(row.ours, form.transform.load([weights.read(name) for name in form.names]), strict=True):
            if name in described:
                arrays[name] = _place(value, described[name])
                continue
            stack, index = stacked_name(name)
            spec = described[stack]
            if stack not in arrays:
                arrays[stack] = jnp.zeros(spec.shape, spec.dtype, device=spec.sharding)
            arrays[stack] = _put(spec.sharding)(arrays[stack], value.astype(spec.dtype), index)
        other = [name for name in row.copies if name in weights.shapes and not weights.equal(name, form.names[0])]
        if other:
            raise Refused(
                f"{weights.place}: {other[0]} is not the copy of {form.names[0]} that it is here: multi-token prediction with an embedding "
                "or a head of its own is not supported; with num_nextn_predict_layers: 0 in its config.json it is left out"
            )
    assert arrays.keys() == described.keys(), arrays.keys() ^ described.keys()
    return arrays


def _place(value: np.ndarray, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on the devices from one on the host, a shard at a time."""
    assert value.shape == spec.shape
    if spec.sharding is None:
        return jnp.asarray(np.ascontiguousarray(value, spec.dtype))
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: np.ascontiguousarray(value[index], spec.dtype))


@functools.cache
def _put(sharding: Any) -> Callable[..., jax.Array]:
    """A compiled function that writes one layer into a stack in place."""
    return jax.jit(lambda stack, layer, index: stack.at[index].set(layer), donate_argnums=0, out_shardings=sharding)


def save(model: schema.Model, family: Family, read: Callable[[str], Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor in the family's published form; `read` gives a parameter by its unrolled name."""
    for row in family.rows(model):
        form = row.forms[0]
        arrays = form.transform.save([np.asarray(read(name)) for name in row.ours])
        yield from zip(form.names, arrays, strict=True)
        yield from ((name, arrays[0]) for name in row.copies)


def saved_shapes(model: schema.Model, family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `save` yields, in its order."""
    ours = parameter_shapes(model)
    return {name: shape for row in family.rows(model) for name, shape in row.shapes(row.forms[0], ours).items()}
