"""The rows of a decoder in the names that nearly all families use: its ends, and layers put together from parts.

A part is a function of (model, slot, beginning of our names, beginning of theirs) that gives the rows of one half of a layer.
"""

from collections.abc import Callable, Iterator, Mapping

from maxtrain.config import schema
from maxtrain.models.families.tensors import TRANSPOSED, Form, Row, fused, linear, per_expert, same

Part = Callable[[schema.Model, schema.Slot, str, str], Iterator[Row]]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PRE_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


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
    copies, heads = ([f"{name}{end}.weight" for name in predictors(model)] for end in ("embed_tokens", "shared_head.head"))
    if model.tie_embeddings:  # in some files the one matrix has the name of the head
        yield same("embedding", EMBEDDING, HEAD, copies=copies + heads)
    else:
        yield same("embedding", EMBEDDING, copies=copies)
        yield same("head", HEAD, copies=heads)
    yield same("norm/scale", "model.norm.weight")


def predictors(model: schema.Model) -> list[str]:
    """Beginning of the names of each module of multi-token prediction, published as a layer behind the last."""
    return [f"model.layers.{model.num_layers + depth}." for depth in range(model.mtp.num_layers if model.mtp else 0)]


def separate_qkv(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """The four projections of grouped-query attention, a tensor each."""
    for name, tensor in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        yield linear(f"{ours}attention/{name}", f"{theirs}self_attn.{tensor}.weight")


def fused_qkv(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Grouped-query attention with queries, keys and values in one tensor (Phi-3)."""
    heads, kv_heads = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    names = tuple(f"{ours}attention/{name}" for name in "qkv")
    yield Row(names, (Form((f"{theirs}self_attn.qkv_proj.weight",), fused((heads, kv_heads, kv_heads))),))
    yield linear(f"{ours}attention/out", f"{theirs}self_attn.o_proj.weight")


def attention_extras(model: schema.Model, ours: str, theirs: str) -> Iterator[Row]:
    """What some models have besides the projections: their biases, norms of queries and keys, sinks."""
    inputs = [] if model.mla else [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")]  # latent attention has biases elsewhere
    biases = inputs * model.qkv_bias + [("out", "o_proj")] * model.out_bias
    for name, tensor in biases:
        yield same(f"{ours}attention/{name}_bias", f"{theirs}self_attn.{tensor}.bias")
    if model.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}attention/{name}/scale", f"{theirs}self_attn.{name}.weight")
    if model.attention_sinks:
        yield same(f"{ours}attention/sinks", f"{theirs}self_attn.sinks")


def gated(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """A gated feed-forward, a tensor for each of its matrices, and its biases."""
    for name in ("gate", "up", "down"):
        yield linear(f"{ours}feed_forward/{name}", f"{theirs}mlp.{name}_proj.weight")
        if model.mlp_bias:
            yield same(f"{ours}feed_forward/{name}_bias", f"{theirs}mlp.{name}_proj.bias")


def fused_gated(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """A gated feed-forward with gate and up in one tensor (Phi-3, GLM-4)."""
    names = f"{ours}feed_forward/gate", f"{ours}feed_forward/up"
    yield Row(names, (Form((f"{theirs}mlp.gate_up_proj.weight",), fused((model.mlp, model.mlp))),))
    yield linear(f"{ours}feed_forward/down", f"{theirs}mlp.down_proj.weight")


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


def decoder(
    norms: Mapping[str, str] = PRE_NORMS, attention: Part = separate_qkv, feed_forward: Part = gated
) -> Callable[[schema.Model], Iterator[Row]]:
    """The rows of models whose layers are attention and a feed-forward; `norms` says what each of their norms is called."""

    def layer(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
        for name, tensor in norms.items():
            yield same(f"{ours}{name}/scale", f"{theirs}{tensor}.weight")
        yield from attention(model, slot, ours, theirs)
        yield from attention_extras(model, ours, theirs)
        yield from feed_forward(model, slot, ours, theirs)

    def rows(model: schema.Model) -> Iterator[Row]:
        yield from ends(model)
        for index, (ours, slot) in enumerate(layers(model)):
            yield from layer(model, slot, ours, f"model.layers.{index}.")
        for depth, theirs in enumerate(predictors(model)):
            ours = f"mtp/{depth}/"
            yield same(f"{ours}embedding_norm/scale", f"{theirs}enorm.weight")
            yield same(f"{ours}hidden_norm/scale", f"{theirs}hnorm.weight")
            yield linear(f"{ours}projection", f"{theirs}eh_proj.weight")
            yield same(f"{ours}norm/scale", f"{theirs}shared_head.norm.weight")
            yield from layer(model, model.slots[model.kinds[-1]], f"{ours}layer/", theirs)

    return rows
