"""The only place that knows how logical array axes are laid out over the mesh.

Models name the axes of what they create (`param`) and of activations worth pinning (`constrain`). The parameter table
read off an abstract model (`parameter_table`) is the single description from which initial values, shardings, restore
and compilation derive. Layout rules are data (`mesh.rules`), so a layout changes without touching a model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxtrain.config.errors import Refused

Axes = tuple[str | None, ...]
LARGE = 2**20  # elements above which a replicated parameter is an accident


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which logical axes are split over it."""

    mesh: jax.sharding.Mesh
    rules: Mapping[Any, tuple[str, ...]]

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes; a mesh axis already used by an earlier array axis is an error."""
        parts = [tuple(self.rules.get(axis, ())) if axis else () for axis in axes]
        used = [name for part in parts for name in part]
        if len(set(used)) != len(used):
            raise Refused(f"mesh.rules split two axes of one array {axes} over the same mesh axis: {dict(self.rules)}")
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        """The sharding of an array with these logical axes; replicated for none."""
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the batch."""
        return tuple(self.rules.get("batch", ()))


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
    """Within this context, `constrain` and `per_batch_shard` act on `layout` while functions are traced."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


# ----------------------------------------------------------------------------------------------------- parameters


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, std: float | None = None, dtype: str = "float32") -> nnx.Param:
    """A parameter, the one way to make an array that is trained.

    Args:
        rngs: source of keys; every call takes the next one.
        shape: sizes, one for each of `axes`.
        axes: logical axis names, looked up in `mesh.rules`.
        std: standard deviation of a truncated normal; None for ones (norm scales).
        dtype: number format it is kept in.
    """
    assert len(shape) == len(axes), (shape, axes)
    key = rngs.params()
    if std is None:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    # 0.8796 is the standard deviation of a unit normal cut at two deviations
    value = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / 0.87962566103423978)
    return nnx.Param(value.astype(dtype), axes=axes)


def is_param(leaf: Any) -> bool:
    """Whether a pytree node is a parameter (or an optimizer moment in its likeness) with axis names."""
    return isinstance(leaf, nnx.Variable)


def param_axes(leaf: nnx.Variable) -> Axes:
    """Logical axes of a parameter; the leading axis of a stack of layers is added here and nowhere else."""
    axes, ndim = leaf.get_metadata("axes"), leaf.get_value().ndim
    return ("layers", *axes) if ndim == len(axes) + 1 else axes


def kind(axes: Axes) -> str:
    """What a parameter is for weight decay and tables: matrix, embedding, norm or bias."""
    own = tuple(axis for axis in axes if axis != "layers")
    if "norm" in own:
        return "norm"
    return "embedding" if own == ("vocab", "embed") else "matrix" if len(own) > 1 else "bias"


@dataclass(frozen=True)
class Parameter:
    """One row of the parameter table."""

    shape: tuple[int, ...]
    dtype: Any
    axes: Axes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def path_name(path: tuple[Any, ...]) -> str:
    """`model/body/0/attention/q` for a pytree key path."""
    names = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return "/".join(name for name in names if name != "value")


def parameter_table(model: Any) -> dict[str, Parameter]:
    """Name, shape, format and axes of every parameter of a (possibly abstract) model."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)[0]
    table = {path_name(path): Parameter(leaf.get_value().shape, leaf.get_value().dtype, param_axes(leaf)) for path, leaf in leaves}
    assert len(table) == len(jax.tree.leaves(model)), "an array of the model was not made by param()"
    return table


def shardings(tree: Any, layout: Layout) -> Any:
    """The sharding of every array of `tree` (a model, an optimizer state ...): by its axes where it has them, else replicated.

    Raises:
        Refused: a dimension does not divide over the mesh axes its rule names.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_param(leaf):
            return layout.sharding()
        axes = param_axes(leaf)
        for size, axis in zip(leaf.get_value().shape, axes, strict=True):
            names = layout.rules.get(axis, ()) if axis else ()
            parts = math.prod(layout.mesh.shape[name] for name in names)
            if size % parts:
                raise Refused(
                    f"mesh.rules.{axis}: {path_name(path)} has {size} along {axis}, which {parts} devices of {'+'.join(names)} cannot "
                    "share evenly: use fewer devices on that axis or another rule"
                )
        return jax.tree.map(lambda _: layout.sharding(axes), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_param)


def check_placement(model: Any, layout: Layout) -> None:
    """Assert that no large parameter with a split axis has ended up whole on every device."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_param)[0]:
        value = leaf.get_value()
        wanted = layout.sharding(param_axes(leaf))
        if value.size >= LARGE and not wanted.is_fully_replicated:
            assert not value.sharding.is_fully_replicated, f"{path_name(path)} {value.shape} is replicated, expected {wanted.spec}"


# ----------------------------------------------------------------------------------------------------- activations


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pin the layout of an activation [*axes]; without a layout in use, or on one device, nothing happens."""
    layout = _layout.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


def per_batch_shard(function: Callable[..., Any], num_batched: int) -> Callable[..., Any]:
    """Run `function` once per shard of the batch, on local rows and whole weights.

    Sorting tokens by expert or accumulating a weight's gradient over chunks must stay on the device: one gather before
    and one reduction after, instead of one in each iteration.

    Args:
        function: takes `num_batched` arrays with a leading batch axis, then weights; every output has a leading batch axis.
        num_batched: how many leading arguments are split.
    """
    layout = _layout.get()
    if layout is None or math.prod(layout.mesh.shape[axis] for axis in layout.batch_axes) == 1:
        return function
    rows = PartitionSpec(layout.batch_axes)

    def wrapped(*args: Any) -> Any:
        specs = tuple(rows if index < num_batched else PartitionSpec() for index in range(len(args)))
        return jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=rows, check_vma=False)(*args)

    return wrapped
