"""The only place that knows how logical array axes are laid out over the mesh.

Models name the axes of what they declare (`param`) and of activations worth pinning (`constrain`). A model as built is a
description without arrays: initial values, shardings, restore and compilation all derive from it. Layout rules are data
(`mesh.rules`), so a layout changes without touching a model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxtrain.config.errors import Refused

Axes = tuple[str | None, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which logical axes are split over it.

    exchange: how devices that share a sequence meet in attention, a row of `ops.split_attention.EXCHANGES`.
    balanced: whether tokens along `length` stand in the balanced order of `ops.ring_attention`.
    attention: what computes attention over a whole sequence, a row of `ops.backends.BACKENDS`.
    microbatches, repeats: of a pipeline over the devices that split `layers` (`parallel.pipeline`); None chooses by the batch.
    stages: within one stage of a pipeline, the mesh axes its stages are laid out over.
    """

    mesh: jax.sharding.Mesh
    rules: Mapping[Any, tuple[str, ...]]
    exchange: str = "ring"
    balanced: bool = False
    attention: str = "xla"
    microbatches: int | None = None
    repeats: int = 1
    stages: tuple[str, ...] = ()

    def split(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that a logical axis is split over."""
        return tuple(name for name in self.rules.get(axis, ()) if self.mesh.shape[name] > 1)

    def parts(self, axis: str | None) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[name] for name in self.split(axis))

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array with these logical axes; a mesh axis already used by an earlier array axis is an error."""
        used = [name for axis in axes for name in self.rules.get(axis, ())]
        if len(set(used)) != len(used):
            raise Refused(f"mesh.rules split two axes of one array {axes} over the same mesh axis: {dict(self.rules)}")
        parts = [self.split(axis) for axis in axes]
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        """The sharding of an array with these logical axes; replicated for none."""
        return NamedSharding(self.mesh, self.spec(axes))

    def of_stage(self) -> Layout:
        """The layout of what one stage of a pipeline computes: its arrays get a dim of stages, and nothing else is split over those."""
        stages = self.split("layers")
        rules = {axis: tuple(name for name in names if name not in stages) for axis, names in self.rules.items()}
        return replace(self, rules=rules, stages=stages)


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
    """Within this context, `constrain` and `per_shard` act on `layout` while functions are traced."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def in_use() -> Layout | None:
    """The layout in use."""
    return _layout.get()


def platform() -> str:
    """What functions are being traced for: the platform of the layout in use, else jax's default."""
    layout = _layout.get()
    return jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform


# ----------------------------------------------------------------------------------------------------- parameters


def param(shape: tuple[int, ...], axes: Axes, *, std: float | None = None, dtype: str = "float32") -> nnx.Param:
    """The description of a parameter, the one way to declare an array that is trained; `initialise` makes the array.

    Args:
        shape: sizes, one for each of `axes`.
        axes: logical axis names, looked up in `mesh.rules`.
        std: standard deviation of the initial truncated normal; None for ones (norm scales).
        dtype: number format it is kept in.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes, std=std)


def is_param(leaf: Any) -> bool:
    """Whether a pytree node is a parameter (or an optimizer moment in its likeness) with axis names."""
    return isinstance(leaf, nnx.Variable)


def param_axes(leaf: nnx.Variable) -> Axes:
    """Logical axes of a parameter; the leading axis of a stack of layers is added here and nowhere else."""
    axes, ndim = leaf.get_metadata("axes"), leaf.get_value().ndim
    return ("layers", *axes) if ndim == len(axes) + 1 else axes


def kind(axes: Axes) -> str:
    """What a parameter is for weight decay and tables: matrix, embedding, norm, bias, or a balancing bias, which no gradient trains."""
    own = tuple(axis for axis in axes if axis != "layers")
    if "balance" in own:
        return "balance"
    if "norm" in own:
        return "norm"
    own = own[1:] if own[:1] == ("expert",) else own  # an expert's bias is a bias
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


_UNROLLED = re.compile(r"(.*\bbody)/(\d+)/(layers/.*)")


def stacked_name(name: str) -> tuple[str, int | None]:
    """The name a parameter of an unrolled layer has in the stack of all periods, and its place there; others stand alone."""
    match = _UNROLLED.fullmatch(name)
    return (f"{match[1]}/{match[3]}", int(match[2])) if match else (name, None)


@functools.cache
def _drawer(shape: tuple[int, ...], dtype: Any, stacked: bool, sharding: Any) -> Callable[..., jax.Array]:
    """A compiled truncated normal for all parameters of one shape; a stack is drawn layer by layer."""

    def draw(key: jax.Array, index: jax.Array, std: jax.Array) -> jax.Array:
        # 0.8796 is the standard deviation of a unit normal cut at two deviations
        unit = jax.random.truncated_normal(jax.random.fold_in(key, index), -2.0, 2.0, shape[stacked:], jnp.float32)
        return (unit * (std / 0.87962566103423978)).astype(dtype)

    return jax.jit(jax.vmap(draw, in_axes=(None, 0, None)) if stacked else draw, out_shardings=sharding)


def initialise(model: Any, seed: int) -> Any:
    """The model with arrays in place of their descriptions, each made in its shards.

    A parameter's values depend on the seed, its name and its layer only: not on the mesh, nor on whether layers are stacked.
    """
    root = jax.random.key(seed)

    def one(path: tuple[Any, ...], leaf: nnx.Variable) -> Any:
        spec, std = leaf.get_value(), leaf.get_metadata("std")
        if std is None:
            value = jnp.ones(spec.shape, spec.dtype, device=spec.sharding)
        else:
            name, index = stacked_name(path_name(path))
            stacked = len(spec.shape) > len(leaf.get_metadata("axes"))
            place = np.arange(spec.shape[0]) if stacked else np.int64(index or 0)
            key = jax.random.fold_in(root, np.uint32(zlib.crc32(name.encode())))
            value = _drawer(spec.shape, spec.dtype, stacked, spec.sharding)(key, place.astype(np.uint32), np.float32(std))
        return jax.tree.map(lambda _: value, leaf)

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=is_param)


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
            if size % layout.parts(axis):
                names = "+".join(layout.split(axis))
                raise Refused(
                    f"mesh.rules.{axis}: {path_name(path)} has {size} along {axis}, which {layout.parts(axis)} devices of {names} cannot "
                    "share evenly: use fewer devices on that axis or another rule"
                )
        return jax.tree.map(lambda _: layout.sharding(axes), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_param)


def check_placement(model: Any, described: Any) -> None:
    """Assert that every parameter lies where its description says, so that no large one has ended up whole on every device."""
    for (path, value), spec in zip(jax.tree_util.tree_flatten_with_path(model)[0], jax.tree.leaves(described), strict=True):
        placed = value.sharding.is_equivalent_to(spec.sharding, value.ndim)
        assert placed, f"{path_name(path)} {value.shape} lies as {value.sharding}, expected {spec.sharding}"


# ----------------------------------------------------------------------------------------------------- activations


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pin the layout of an activation [*axes]; without a layout in use, or on one device, nothing happens."""
    layout = _layout.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes))


def parts(axis: str) -> int:
    """Into how many parts a logical axis is split by the layout in use; 1 without one."""
    layout = _layout.get()
    return 1 if layout is None else layout.parts(axis)


def exchange() -> str:
    """How devices that share a sequence meet in attention, by the layout in use."""
    layout = _layout.get()
    return "gather" if layout is None else layout.exchange


def attention_backend() -> str:
    """What computes attention over a whole sequence, by the layout in use."""
    layout = _layout.get()
    return "xla" if layout is None else layout.attention


def is_balanced() -> bool:
    """Whether tokens along `length` stand in the balanced order in the layout in use."""
    layout = _layout.get()
    return layout is not None and layout.balanced


def is_split() -> bool:
    """Whether the layout in use spreads arrays over several devices."""
    layout = _layout.get()
    return layout is not None and layout.mesh.size > 1


def per_shard(
    function: Callable[..., Any], inputs: Sequence[Axes], outputs: Axes | tuple[Axes, ...], *, always: bool = False
) -> Callable[..., Any]:
    """Run `function` once on every device, on its part of the arrays.

    What must stay on the device (sorting tokens by expert, accumulating a weight's gradient over chunks, attention of a
    head) or exchange exactly what it says (`psum`, `index`, `send` ...) is written so. An axis of an input that no rule
    splits, or that is None, is whole on every device: one gather before and one reduction of its gradient after.

    Args:
        function: takes arrays with the axes `inputs`, all of them positional.
        inputs: logical axes of each argument.
        outputs: logical axes of the result, or of each of several.
        always: also on a mesh that splits none of the inputs, where a kernel would be left to a compiler that cannot share it out.
    """
    layout = _layout.get()
    split = layout is not None and (layout.stages or any(layout.split(axis) for axes in inputs for axis in axes))
    if layout is None or layout.mesh.size == 1 or not (split or always):
        return function
    several = bool(outputs) and isinstance(outputs[0], tuple)
    out_specs: Any = tuple(layout.spec(cast(Axes, axes)) for axes in outputs) if several else layout.spec(cast(Axes, outputs))
    in_specs = tuple(layout.spec(axes) for axes in inputs)
    if layout.stages:
        return _in_each_stage(function, layout, in_specs, out_specs)
    return jax.shard_map(function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _in_each_stage(function: Callable[..., Any], layout: Layout, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`per_shard` under the `vmap` over the stages of a pipeline: a device has one entry of that dim, and `function` never sees it."""

    def whole(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def staged(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(layout.stages, *spec)

    def over_stages(axis_size: int, mapped: list[bool], *arrays: Any) -> tuple[Any, Any]:
        def local(*arrays: Any) -> Any:
            own = [array[0] if has else array for array, has in zip(arrays, mapped, strict=True)]
            return jax.tree.map(lambda x: x[None], function(*own))

        specs = tuple(staged(spec) if has else spec for spec, has in zip(in_specs, mapped, strict=True))
        out = whole(local, specs, jax.tree.map(staged, out_specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec)))(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    mapped = jax.custom_batching.custom_vmap(whole(function, in_specs, out_specs))
    mapped.def_vmap(over_stages)
    return mapped


def _names(axis: str) -> tuple[str, ...]:
    layout = _layout.get()
    return () if layout is None else layout.split(axis)


def psum(x: T, axis: str) -> T:
    """Within `per_shard`: the sum over the devices that split a logical axis."""
    names = _names(axis)
    return jax.lax.psum(x, names) if names else x


def pmax(x: jax.Array, axis: str) -> jax.Array:
    """Within `per_shard`: the largest over the devices that split a logical axis."""
    names = _names(axis)
    return jax.lax.pmax(x, names) if names else x


def index(axis: str) -> Any:
    """Within `per_shard`: which part of a logical axis this device has, 0 if it has all."""
    names = _names(axis)
    return jax.lax.axis_index(names) if names else 0


def send(x: jax.Array, axis: str, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Within `per_shard`: x of the devices that split a logical axis goes from the first to the second of each pair."""
    return jax.lax.ppermute(x, _names(axis), pairs)


def all_to_all(x: jax.Array, axis: str, *, split: int, concat: int) -> jax.Array:
    """Within `per_shard`: part i of dim `split` goes to device i of a logical axis; what arrives is put together along dim `concat`."""
    return jax.lax.all_to_all(x, _names(axis), split, concat, tiled=True)


def permute(x: T, axis: str) -> T:
    """Within `per_shard`: the arrays of the device before this one along a logical axis, around in a ring."""
    n = parts(axis)
    return jax.tree.map(lambda leaf: send(leaf, axis, [(i, (i + 1) % n) for i in range(n)]), x)


def ragged_all_to_all(x: jax.Array, room: jax.Array, transfer: tuple[jax.Array, ...], axis: str) -> jax.Array:
    """Within `per_shard`: rows of x into `room` on the devices of a logical axis.

    transfer: where rows start here, how many go, where they start there, how many come; int32, one for each device.
    """
    return jax.lax.ragged_all_to_all(x, room, *transfer, axis_name=_names(axis))
