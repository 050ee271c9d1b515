"""Memory and time of a train step on one device, by arithmetic: what the planner searches with and a report is compared to.

Memory counts what XLA keeps at the same time in the backward pass. Time is a roofline: the larger of products at the chip's peak and
memory at its bandwidth, plus what the networks cannot hide behind them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from maxtrain.config import schema
from maxtrain.models import flops
from maxtrain.models.decoder import Decoder
from maxtrain.ops.attention_tiles import Spans
from maxtrain.ops.cudnn_attention import MOST
from maxtrain.ops.splash_attention import BLOCK
from maxtrain.parallel.mesh import optimizer_layout
from maxtrain.parallel.sharding import Axes, Layout, is_param, param_axes, path_name
from maxtrain.training.collectives import Collective
from maxtrain.training.hardware import Chip
from maxtrain.training.optimizer import make_optimizer

HIDDEN = {"stage", "data", "fsdp"}  # mesh axes whose traffic runs beside the products: weights and gradients
REPEATED = {"none": (), "dots": ("attention",), "full": ("projections", "attention", "feed_forward")}  # parts computed again


class Leaf(NamedTuple):
    """An array of the state."""

    name: str
    axes: Axes
    shape: tuple[int, ...]
    width: int
    """Bytes of an element."""

    def elements(self, layout: Layout) -> int:
        """On one device."""
        return math.prod(-(-size // layout.parts(axis)) for size, axis in zip(self.shape, self.axes, strict=True))


def leaves(tree: Any) -> list[Leaf]:
    """The parameters, or moments in their likeness and counters beside them, of a described pytree."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)[0]:
        value, axes = (leaf.get_value(), param_axes(leaf)) if is_param(leaf) else (leaf, (None,) * leaf.ndim)
        found.append(Leaf(path_name(path), axes, value.shape, value.dtype.itemsize))
    return found


@dataclass(frozen=True)
class Work:
    """What a train step does, whatever the mesh."""

    config: schema.Config
    parameters: list[Leaf]
    moments: list[Leaf]

    @classmethod
    def of(cls, config: schema.Config) -> Work:
        """Of a resolved config."""
        model = Decoder(config.model, config.precision, config.remat)
        return cls(config, leaves(model), leaves(jax.eval_shape(make_optimizer(config.optimizer, config.precision).init, model)))

    @property
    def model_flops(self) -> float:
        """Operations of a step, by the count that MFU is defined with."""
        return flops.training(self.config.model, self.config.data.length) * self.config.data.batch_size * self.config.data.length

    @property
    def hardware_flops(self) -> float:
        """Operations of a step with those that rematerialisation and attention's backward pass repeat."""
        forward = flops.forward(self.config.model, self.config.data.length, training=True)
        again = sum(forward[part] for part in REPEATED[self.config.remat.policy]) + forward["attention"] / 2
        return self.model_flops + again * self.config.data.batch_size * self.config.data.length

    def local_tokens(self, layout: Layout, axis: str) -> int:
        """Tokens of a microbatch on one device, its sequences split over the devices of `length` or `residual`."""
        tokens = self.config.data.batch_size * self.config.data.length // self.config.train.microbatches
        return -(-tokens // (layout.parts("batch") * layout.parts(axis)))

    def layer(self, layout: Layout, gathered: bool) -> float:
        """Parameters of a layer on one device, as an average; gathered for its products, or as they are kept."""
        split = Layout(layout.mesh, {**layout.rules, "embed": (), "layers": ()}) if gathered else layout
        body = [leaf for leaf in self.parameters if leaf.name.startswith(("prefix/", "body/", "remainder/"))]
        return sum(leaf.elements(split) for leaf in body) / self.config.model.num_layers


# ------------------------------------------------------------------------------------------------------ memory


def memory(work: Work, layout: Layout) -> dict[str, float]:
    """Bytes on one device, by kind, at the moment that takes most: the loss, a period's backward pass, or the embedding's gradient."""
    config, model = work.config, work.config.model
    width = 2 if config.precision.compute == "bfloat16" else 4
    parameters = sum(leaf.elements(layout) for leaf in work.parameters)
    tokens, resting = work.local_tokens(layout, "length"), work.local_tokens(layout, "residual")
    vocab = model.vocab_size / layout.parts("vocab")
    chunk = tokens * min(1.0, config.train.loss_chunk / config.data.length)
    always = {
        "parameters": float(sum(leaf.elements(layout) * leaf.width for leaf in work.parameters)),
        "optimizer": float(sum(leaf.elements(optimizer_layout(config.mesh, layout)) * leaf.width for leaf in work.moments)),
        "batch": 5.0 * 4 * config.data.batch_size * config.data.length / layout.parts("batch") / layout.parts("length"),
        "gradients": sum(leaf.elements(layout) * leaf.width for leaf in work.parameters)
        + 4.0 * parameters * (config.train.microbatches > 1),
        "weights to multiply": float(width * parameters),
    }
    kept = {"kept activations": width * sum(_kept(config, layout, name, tokens, resting) for name in model.trained_kinds)}
    if config.remat.policy == "none":
        kept["kept activations"] += len(model.trained_kinds) * _statistics(config, layout, tokens)
    heads = 1 if model.mtp is None else 1 + model.mtp.num_layers  # losses, each with its part of the head's gradient
    # Held through the backward pass, because other losses, or the embedding where it is the same table, add to it
    waiting = {"head's gradient": 4.0 * heads * vocab * model.embed} if heads > 1 or model.tie_embeddings else {}
    head = {
        "head and its gradient": (width + 4.0 * heads) * vocab * model.embed,
        "logits": 4 * chunk * vocab + 3 * width * tokens * model.embed,
    }
    # The layers of a period are one body, in which the compiler puts products of one off until those of another are done
    work_of = {name: _working(config, layout, name, tokens, width) for name in model.trained_kinds}
    period = {
        **waiting,
        "a layer's weights": 2.0 * width * work.layer(layout, gathered=True),
        "a period at work": max(sum(work_of.get(name, 0.0) for name in model.layer_pattern), *work_of.values()),
    }
    table = waiting | {"embedding's gradient": (width + 4.0) * vocab * model.embed}
    return always | max(kept | head, kept | period, table, key=lambda kinds: sum(kinds.values()))


def _widths(config: schema.Config, layout: Layout, name: str) -> tuple[float, float]:
    """Elements a token takes on one device between the products of attention, and of the feed-forward that all tokens share."""
    model = config.model
    heads = (model.num_heads * (model.head_width + model.value_width) + 2 * model.kv_heads * model.head_width) / layout.parts("heads")
    shared = model.mlp if _routed(model, name) is None else model.moe and model.moe.shared_mlp
    return heads, 2 * (shared or 0) / layout.parts("mlp")


def _routed(model: schema.Model, name: str) -> schema.Moe | None:
    return model.moe if model.slots[name].feed_forward == "moe" else None


def _rows(moe: schema.Moe, layout: Layout, tokens: int) -> float:
    """Rows for which a device's experts have room: without dropping, all of all devices may come to one."""
    return tokens * moe.experts_per_token * (layout.parts("expert") if moe.dispatch == "dropless" else moe.capacity_factor)


def _kept(config: schema.Config, layout: Layout, name: str, tokens: int, resting: int) -> float:
    """Elements that a layer keeps for its backward pass."""
    model, (attention, hidden) = config.model, _widths(config, layout, name)
    if config.remat.policy == "full":
        return resting * model.embed
    if config.remat.policy == "dots":
        outputs = model.num_heads * model.value_width / layout.parts("heads")  # of attention itself, computed again
        return tokens * (attention - outputs + hidden) + resting * 2 * model.embed
    kept, moe = tokens * (attention + 1.5 * hidden) + resting * 5 * model.embed, _routed(model, name)
    if moe is not None:
        kept += (
            _rows(moe, layout, tokens) * (model.embed + 3 * moe.mlp / layout.parts("mlp")) + tokens * moe.experts_per_token * model.embed
        )
    return kept


def _working(config: schema.Config, layout: Layout, name: str, tokens: int, width: int) -> float:
    """Bytes that the backward pass of one layer takes while it runs."""
    model, length = config.model, config.data.length
    attention, hidden = _widths(config, layout, name)
    window = model.slots[name].window
    at_a_time = Spans.of(length, window).scores(window) if _plain(config, width) else 0
    scores = _sequences(config, layout) * at_a_time * (4 + 4 + width)
    working, moe = tokens * (4 * model.embed + 4 * attention + 2 * hidden), _routed(model, name)
    if moe is not None:
        wide = 5 if layout.parts("expert") == 1 else 3  # arrays of rows at a time: where rows travel, their room is the larger part
        working += _rows(moe, layout, tokens) * (wide * model.embed + 3 * moe.mlp / layout.parts("mlp"))
    return width * working + scores + _statistics(config, layout, tokens)


def _statistics(config: schema.Config, layout: Layout, tokens: int) -> float:
    """Bytes of what cuDNN keeps of a layer's softmax: a float32 for each token and head, and for each document that has room."""
    return 4.0 * MOST * tokens * config.model.num_heads / layout.parts("heads") if config.train.attention == "cudnn" else 0.0


def _plain(config: schema.Config, width: int) -> bool:
    """Whether attention is that of plain XLA, whose scores lie in memory, and not a kernel."""
    auto = config.train.attention == "auto" and width == 2 and config.data.length % BLOCK == 0
    return not (auto or config.train.attention in ("splash", "cudnn"))


def _sequences(config: schema.Config, layout: Layout) -> float:
    """Sequences of a microbatch times heads, on one device."""
    rows = config.data.batch_size / config.train.microbatches / layout.parts("batch")
    return rows * config.model.num_heads / layout.parts("heads")


# -------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Time:
    """Seconds of a step that each resource of a device takes."""

    compute: float
    memory: float
    hidden: Mapping[str, float] = field(default_factory=dict)
    """By network (ICI, DCN), of traffic that can run beside the products."""
    exposed: float = 0.0
    """Of traffic that the products wait for."""

    @property
    def step(self) -> float:
        """Of the step."""
        return max(self.compute, self.memory, *self.hidden.values(), 0.0) + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "memory": self.memory, **self.hidden, "exposed ICI": self.exposed}
        return max(parts, key=lambda name: parts[name])


def time(work: Work, layout: Layout, chip: Chip, traffic: Iterable[Collective]) -> Time:
    """The roofline of a step with these collectives."""
    devices, hidden, exposed = layout.mesh.size, {"ICI": 0.0, "DCN": 0.0}, 0.0
    for item in traffic:
        seconds = network_seconds(item, chip)
        if item.network == "ICI" and not (set(item.axes) <= HIDDEN or "fsdp" in item.axes):
            exposed += seconds
        else:
            hidden[item.network] += seconds
    used = {name: seconds for name, seconds in hidden.items() if seconds}
    return Time(work.hardware_flops / devices / chip.tflops / 1e12, memory_traffic(work, layout) / chip.bandwidth / 1e9, used, exposed)


def network_seconds(item: Collective, chip: Chip) -> float:
    """Of a collective in a step, both ways along all axes of the torus that its devices lie on; all-to-all passes a quarter of each."""
    speed = chip.dcn if item.network == "DCN" else chip.ici
    share = 1 / item.rings
    if "all-to-all" in item.kind and item.network == "ICI":
        share = max(share, item.group**share / 4)
    elif item.kind == "collective-permute":
        share = 1.0
    return item.sent * item.runs * share / ((speed or math.inf) * 1e9)


def memory_traffic(work: Work, layout: Layout) -> float:
    """Bytes that a device reads and writes in its memory: state, weights for each pass, and what passes between products."""
    config = work.config
    width = 2 if config.precision.compute == "bfloat16" else 4
    passes = (3 if config.remat.policy == "none" else 4) * config.train.microbatches
    kept = memory(work, layout)
    weights = width * work.layer(layout, gathered=True) * config.model.num_layers * passes
    tokens = work.local_tokens(layout, "length")
    between = sum(
        _working(config, layout, name, tokens, width) + _all_scores(config, layout, name, width) for name in config.model.trained_kinds
    )
    between *= 2 * config.train.microbatches
    return 2 * (kept["parameters"] + kept["optimizer"] + kept["gradients"]) + weights + between


def _all_scores(config: schema.Config, layout: Layout, name: str, width: int) -> float:
    """Bytes of the scores that plain attention makes of a layer's microbatch: forward, backward and where it is computed again."""
    length = config.data.length
    made = flops.visible_keys(length, config.model.slots[name].window) * length / layout.parts("length")
    passes = 2 + ("attention" in REPEATED[config.remat.policy])
    return _sequences(config, layout) * _plain(config, width) * made * (4 + 4 + width) * passes


def traffic(work: Work, layout: Layout, slices: Mapping[str, int], torus: Sequence[int] = ()) -> list[Collective]:
    """The collectives of a step that the layout calls for; `slices` is how many each mesh axis spans, `torus` the sides of a slice."""
    config, model, found = work.config, work.config.model, list[Collective]()
    width, micro = (2 if config.precision.compute == "bfloat16" else 4), config.train.microbatches
    remat = config.remat.policy == "full"

    def add(kind: str, axes: tuple[str, ...], size: float, count: float) -> None:
        across = math.prod(slices.get(axis, 1) for axis in axes)
        group = math.prod(layout.mesh.shape[axis] for axis in axes)
        for network, n in (("ICI", group // across), ("DCN", across)):  # within slices first, the rest between them
            if n > 1:
                part = size / (group // across if network == "DCN" else 1)
                found.append(Collective(kind, axes, network, size, part * _share(kind, n), round(count), n, _rings(n, torus, network)))

    shards, whole = layout.split("embed"), Layout(layout.mesh, {**layout.rules, "embed": ()})
    if shards:  # layers are multiplied with forward and backward; a table once as the embedding, once as the head
        tables, uses = [leaf for leaf in work.parameters if leaf.axes == ("vocab", "embed")], 1 + model.tie_embeddings
        in_tables = sum(leaf.elements(whole) for leaf in tables)
        in_layers = sum(leaf.elements(whole) for leaf in work.parameters) - in_tables
        for kind, of_layers, each in (("all-gather", 2, width), ("reduce-scatter", 1, 4)):  # gradients are summed in float32
            add(kind, shards, each * in_layers, of_layers * micro)
            add(kind, shards, each * in_tables, uses * micro)
    replicas = tuple(axis for axis in layout.split("batch") if axis not in shards and axis not in layout.split("expert"))
    if replicas:
        add("all-reduce", replicas, 4 * sum(leaf.elements(layout) for leaf in work.parameters), micro)
    depth, tokens = len(model.trained_kinds), work.local_tokens(layout, "length")
    tensor = layout.split("heads")
    if tensor:
        add("all-gather", tensor, width * tokens * model.embed, depth * (6 + 2 * remat) * micro)
        add("reduce-scatter", tensor, width * tokens * model.embed, depth * (4 + remat) * micro)
    context = layout.split("length")
    if context:
        keys, others = tokens * 2 * model.kv_heads * model.head_width / layout.parts("heads"), layout.parts("length") - 1
        passes = width * (2 + remat) + 4  # forward, again, and backward with the gradients in float32
        for _ in range(depth * micro):
            found.append(Collective("collective-permute", context, "ICI", passes * keys, passes * keys, others, others + 1))
    experts, moe = layout.split("expert"), model.moe
    if experts and moe is not None:
        routed = sum(model.slots[name].feed_forward == "moe" for name in model.trained_kinds)
        add("all-to-all", experts, width * tokens * moe.experts_per_token * model.embed, routed * (4 + 2 * remat) * micro)
    return found


def _rings(n: int, torus: Sequence[int], network: str) -> int:
    """How many axes of the torus n neighbours take up, the longest first."""
    taken = itertools.accumulate(sorted(torus, reverse=True), initial=1, func=operator.mul)
    return 1 if network == "DCN" else max(1, sum(room < n for room in itertools.islice(taken, len(torus))))


def _share(kind: str, n: int) -> float:
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n
