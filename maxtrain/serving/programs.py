"""What the engine runs: the model as it is served, the size of its cache, and the programs compiled for a few shapes of a step."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.decoder import Decoder
from maxtrain.ops.linear import Transposed, products_in
from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import Layout, is_param, param_axes
from maxtrain.serving.step import Inputs, Shape, State, describe, make_step, mark

CPU_MEMORY = 1 << 30  # bytes of the cache on CPU, unless told otherwise


class Programs:
    """The programs of a resolved config on a layout; `valid` ids mean a token.

    Raises:
        Refused: `serve` contradicts the model, or the cache does not fit.
    """

    def __init__(self, config: schema.Config, layout: Layout, valid: int) -> None:
        self.config, self.serve, self.valid = config.model, config.serve, valid
        if layout.parts("layers") > 1:
            names = "+".join(layout.split("layers"))
            raise Refused(f"mesh.{names}={layout.parts('layers')}: serving has no pipeline: set it to 1, and split heads by mesh.tensor")
        # tokens of a step are rows of length 1, not sequences that could be split
        self.layout = Layout(layout.mesh, {**layout.rules, "length": (), "residual": ()})
        self.max_length = self.serve.max_length or self.config.served_length
        if self.max_length > self.config.max_length:
            raise Refused(f"serve.max_length={self.max_length} is longer than model.max_length={self.config.max_length}")
        if self.max_length > self.config.served_length:
            raise Refused(
                f"serve.max_length={self.max_length} is longer than rope.scaling.original_length={self.config.served_length}: "
                "it turns the keys of longer documents by other angles, those in the cache stay as they are"
            )
        model = self.config
        if model.moe is not None:  # capacity is a matter of sequences, and a request is never to lose a token to another
            model = model.model_copy(update={"moe": model.moe.model_copy(update={"dispatch": "dropless"})})
        self._model = Decoder(model, config.precision, schema.Remat(policy="none"))
        if self.serve.draft == "mtp" and model.mtp is None:
            raise Refused("serve.draft=mtp: the model has no multi-token prediction (model.mtp): take ngram")
        self.num_guesses = self.serve.speculate if model.mtp and self.serve.draft != "ngram" else 0
        devices = layout.mesh.devices
        self.on_one_cpu = devices.size == 1 and devices.flat[0].platform == "cpu"
        self.max_rows = self._shared(self.serve.max_requests)
        self.num_pages = self._num_pages()
        self.spec: State = self._describe(self.num_pages, self.serve.max_requests)
        self.shapes = sorted(self._shapes(), key=lambda shape: shape.num_tokens)
        self._steps: dict[Shape, Any] = {}
        self._mark: Any = None
        self._zeros: Any = None

    def _shared(self, rows: int) -> int:
        """A number of rows that the devices of a batch share evenly."""
        parts = self.layout.parts("batch")
        return -(-rows // parts) * parts

    def _num_pages(self) -> int:
        """How many pages the memory holds, the one for nobody included."""
        size = self.serve.page_size
        described = self._describe(1, 1)
        pools = jax.tree.leaves((described.caches, described.ahead))
        page = sum(math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize for spec in pools)
        needed = -(-self.max_length // size)
        if self.serve.memory_gib is not None:
            memory = int(self.serve.memory_gib * (1 << 30))
        else:
            stats = self.layout.mesh.devices.flat[0].memory_stats() or {}
            free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
            memory = max(free // 2 or CPU_MEMORY, (needed + 1) * page)
        pages = min(memory // page, self.serve.max_requests * needed + 1)
        if pages <= needed:
            raise Refused(
                f"serve.memory_gib={self.serve.memory_gib} holds {max(0, pages - 1) * size} tokens, but one request of serve.max_length="
                f"{self.max_length} takes {(needed + 1) * page / (1 << 30):.3g} GiB: raise the one or lower the other"
            )
        return pages

    def _describe(self, num_pages: int, num_slots: int) -> State:
        with sharding.use(self.layout):
            return describe(self._model, num_pages, self.serve.page_size, num_slots, self.layout, bool(self.num_guesses))

    def _shapes(self) -> Iterable[Shape]:
        """Few and many rows without blocks, many rows with some and with all blocks; one shape for everything if `deterministic`."""
        most, blocks = self.max_rows, self.serve.num_blocks
        sizes = {(most, blocks)}
        if not self.serve.deterministic:
            few = {self._shared(max(1, most // part)) for part in (1, 4, most)} | {min(most, self._shared(1 + self.serve.speculate))}
            sizes |= {(rows, 0) for rows in few} | {(most, max(1, blocks // 4))}
        width = -(-self.max_length // self.serve.page_size)
        return (Shape(rows, blocks, self.serve.block, width) for rows, blocks in sizes)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile everything ahead of time, while what stands within goes on."""
        kept, vocab = jax.tree.map(lambda s: s.sharding, self.spec), self.config.vocab_size
        lowered = [*self.lower(self.shapes)]
        with sharding.use(self.layout):
            rows = (np.int32(0), np.zeros(vocab, np.int32), np.zeros(vocab, np.float32))
            lowered.append(jax.jit(mark, donate_argnums=0, out_shardings=kept).lower(self.spec, *self._abstract(rows)))
            zeros = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.spec), out_shardings=kept)
            lowered.append(zeros.lower())
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered)
            yield
            *steps, self._mark, self._zeros = compiled
        self._steps = dict(zip(self.shapes, steps, strict=True))

    def lower(self, shapes: Iterable[Shape]) -> Iterator[Any]:
        """The step of each shape, ready to compile."""
        kept, model = jax.tree.map(lambda s: s.sharding, self.spec), self.lay_out(self.weights)
        # kernels ask the default device what they are compiled for
        device = jax.default_device(self.layout.mesh.devices.flat[0])
        with sharding.use(self.layout), device, products_in(self._model.compute):
            step = jax.jit(make_step(self.valid, self.num_guesses), donate_argnums=1, out_shardings=(kept, self.layout.sharding()))
            for shape in shapes:
                yield step.lower(model, self.spec, self._abstract(self.inputs(shape)))

    @property
    def weights(self) -> Any:
        """The model as shapes, formats and shardings."""
        places = sharding.shardings(self._model, self.layout)
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), self._model, places)

    def _abstract(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=self.layout.sharding()), tree)

    def inputs(self, shape: Shape) -> Inputs:
        """Inputs of a step in which nothing happens, to be filled."""
        return Inputs.empty(shape, self.serve.max_requests)

    def shape(self, rows: int, blocks: int) -> Shape:
        """The smallest one with places for so many rows and blocks."""
        return next(shape for shape in self.shapes if shape.num_rows >= rows and shape.num_blocks >= blocks)

    def state(self) -> State:
        """The state before the first step."""
        return self._zeros()

    def step(self, shape: Shape, model: Any, state: State, inputs: Inputs) -> tuple[State, Any]:
        """Start a step; its outputs are arrays to come."""
        return self._steps[shape](model, state, inputs)

    def mark(self, state: State, slot: int, counts: np.ndarray, bias: np.ndarray) -> State:
        """See `step.mark`."""
        return self._mark(state, np.int32(slot), counts, bias)

    def lay_out(self, model: Any) -> Any:
        """The model, or its description, as it is served: on one CPU with its matrices as `Transposed`, a copy, elsewhere unchanged.

        Raises:
            Refused: it is another model than the one that the programs are for.
        """
        leaves, tree = jax.tree.leaves(model), jax.tree.structure(self._model)
        self._check_weights(leaves)
        model = jax.tree.unflatten(tree, leaves)
        if not self.on_one_cpu:
            return model

        def multiplied(leaf: Any) -> bool:
            return leaf.get_value().ndim == 2 and not {"vocab", "expert", "layers"} & set(param_axes(leaf))

        params = jax.tree.leaves(model, is_leaf=is_param)
        rows = iter(_transposed([leaf.get_value() for leaf in params if multiplied(leaf)]))
        changed = [leaf.replace(Transposed(next(rows))) if multiplied(leaf) else leaf for leaf in params]
        return jax.tree.unflatten(jax.tree.structure(model, is_leaf=is_param), changed)

    def _check_weights(self, leaves: list[Any]) -> None:
        wanted = jax.tree_util.tree_flatten_with_path(self.weights)[0]
        if len(leaves) != len(wanted):
            raise Refused(f"{len(leaves)} arrays cannot take the place of the model that is served, which has {len(wanted)}")
        for leaf, (path, want) in zip(leaves, wanted, strict=True):
            name = sharding.path_name(path)
            if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                raise Refused(f"the weights to be served have a {type(leaf).__name__} as {name}, not an array on the devices")
            if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
                raise Refused(
                    f"the weights to be served are another model's: {name} is {leaf.dtype} {list(leaf.shape)}, "
                    f"but {want.dtype} {list(want.shape)} in the one that the engine was made for"
                )
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise Refused(f"the weights to be served were given away, to a train step perhaps: {name} is no longer there")
            if isinstance(leaf, jax.Array) and not leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim):
                raise Refused(f"the weights to be served have {name} laid out as {leaf.sharding}, but the engine {want.sharding}")


def _transposed(matrices: list[Any]) -> list[Any]:
    """Arrays, or descriptions of them, with their dims exchanged."""
    if all(isinstance(x, jax.Array) for x in matrices):
        return _transpose(matrices)
    return [jax.ShapeDtypeStruct(x.shape[::-1], x.dtype, sharding=x.sharding) for x in matrices]


@jax.jit
def _transpose(matrices: list[jax.Array]) -> list[jax.Array]:
    return [x.T for x in matrices]
