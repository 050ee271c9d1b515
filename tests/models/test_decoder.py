"""The decoder against a plain numpy implementation, and the promises about layouts, caches and names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.models.decoder import Decoder
from maxtrain.ops import rope
from maxtrain.ops.attention import Context
from maxtrain.ops.pages import Pages
from maxtrain.parallel.sharding import initialise, parameter_table

F32, REMAT = schema.Precision(compute="float32"), schema.Remat()
MOE = schema.Moe(num_experts=4, experts_per_token=2, mlp=24)
TINY: dict[str, Any] = {"vocab_size": 61, "embed": 32, "mlp": 48, "num_heads": 4, "num_kv_heads": 2, "num_layers": 5}
CONFIGS = {
    "llama": schema.Model(**TINY, rope=schema.Rope(theta=500.0, scaling=schema.RopeScaling(factor=4.0, original_length=16))),
    "untied": schema.Model(**TINY, tie_embeddings=False, head_dim=16),
    "mixtral": schema.Model(**TINY, slots={"layer": schema.Slot(feed_forward="moe")}, moe=MOE),
    "pattern": schema.Model(
        **TINY,
        slots={
            "local": schema.Slot(window=9, rope=schema.Rope(theta=100.0)),
            "global": schema.Slot(feed_forward="moe"),
            "first": schema.Slot(),
        },
        prefix=("first",),
        layer_pattern=("local", "local", "global"),
        moe=MOE,
    ),
}

LONGROPE = schema.RopeScaling(
    kind="longrope", factor=4.0, original_length=16, short_factors=(1.0, 1.5, 2.0, 3.0), long_factors=(1.0, 3.0, 9.0, 27.0)
)
MECHANISMS = CONFIGS | {  # what transformers is the reference for, in tests/models/test_families.py
    "sandwich": schema.Model(
        **TINY,
        norm="rms_one_plus",
        norm_placement="sandwich",
        qk_norm="head",
        attention_scale=0.4,
        attention_softcap=2.0,
        final_softcap=1.5,
        activation="gelu_tanh",
        embedding_multiplier=5.0,
        slots={"local": schema.Slot(window=9, rope=schema.Rope(theta=100.0)), "global": schema.Slot()},
        layer_pattern=("local", "local", "global"),
    ),
    "post": schema.Model(
        **TINY,
        head_dim=16,
        norm_placement="post",
        qk_norm="projection",
        qkv_bias=True,
        out_bias=True,
        attention_sinks=True,
        residual_multiplier=0.5,
        rope=schema.Rope(fraction=0.5, interleaved=True, scaling=schema.RopeScaling(kind="yarn", factor=4.0, original_length=16)),
        slots={"rotary": schema.Slot(), "plain": schema.Slot(rotary=False)},
        layer_pattern=("rotary", "plain"),
    ),
    "parallel": schema.Model(
        **TINY, norm="layer", norm_placement="parallel", qk_norm="each_head", mlp_bias=True, logit_multiplier=0.25, activation="gelu"
    ),
    "each head": schema.Model(**TINY, qk_norm="each_head", rope=schema.Rope(scaling=LONGROPE)),
}


def build(cfg, layers, remat=REMAT):
    cfg = cfg.model_copy(update={"layers": layers})
    return initialise(Decoder(cfg, F32, remat), 0)


def inputs(length=40, batch=2):
    tokens = np.random.default_rng(0).integers(0, 61, (batch, length)).astype(np.int32)
    split = length // 3  # two documents in every row
    positions = np.concatenate([np.arange(split), np.arange(length - split)]).astype(np.int32)
    segments = np.repeat([1, 2], [split, length - split]).astype(np.int32)
    return tokens, Context(np.tile(positions, (batch, 1)), np.tile(segments, (batch, 1)))


def logits(model, tokens, context):
    return np.asarray(jax.jit(lambda m, t, c: m.logits(m(t, c).hidden))(model, tokens, context))


# ------------------------------------------------------------------------------------------------- numpy reference


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotated(x, positions, cfg):
    """x [length, heads, width]; pairs (i, i + width/2) turned by position * frequency."""
    angle = positions[:, None] * rope.frequencies(cfg, x.shape[-1])
    turn = np.exp(1j * angle)[:, None]
    pair = (x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * turn
    return np.concatenate([pair.real, pair.imag], -1)


def reference(cfg, weights, tokens, positions, segments):
    """Logits [length, vocab] of one row, token by token, in float64."""
    x = weights["embedding"][tokens]
    period, first = len(cfg.layer_pattern), len(cfg.prefix)
    for index, name in enumerate(cfg.kinds):
        body = index - first
        if index < first:
            path = f"prefix/layers/{index}"
        elif body < cfg.num_periods * period:
            path = f"body/{body // period}/layers/{body % period}"
        else:
            path = f"remainder/layers/{body % period}"
        w = {key[len(path) + 1 :]: value for key, value in weights.items() if key.startswith(path + "/")}
        slot = cfg.slots[name]
        h = norm(x, w["attention_norm/scale"], cfg.norm_eps)
        q, k, v = ((h @ w[f"attention/{n}"]).reshape(len(h), -1, cfg.head_width) for n in "qkv")
        angles = slot.rope or cfg.rope
        q, k = rotated(q, positions, angles), rotated(k, positions, angles)
        out = np.zeros_like(q)
        for i in range(len(tokens)):
            keys = [j for j in range(i + 1) if segments[j] == segments[i] and (slot.window is None or i - j < slot.window)]
            for head in range(cfg.num_heads):
                kv = head * cfg.num_kv_heads // cfg.num_heads
                out[i, head] = softmax(k[keys, kv] @ q[i, head] / np.sqrt(cfg.head_width)) @ v[keys, kv]
        x = x + out.reshape(len(h), -1) @ w["attention/out"]
        h = norm(x, w["feed_forward_norm/scale"], cfg.norm_eps)
        gate, up, down = (w[f"feed_forward/{n}"] for n in ("gate", "up", "down"))
        if slot.feed_forward == "dense":
            x = x + (silu(h @ gate) * (h @ up)) @ down
            continue
        probabilities = softmax(h @ w["feed_forward/router"])
        for i, p in enumerate(probabilities):
            chosen = np.argsort(-p)[: cfg.moe.experts_per_token]
            for e in chosen:
                x[i] = x[i] + p[e] / p[chosen].sum() * ((silu(h[i] @ gate[e]) * (h[i] @ up[e])) @ down[e])
    return norm(x, weights["norm/scale"], cfg.norm_eps) @ weights.get("head", weights["embedding"]).T


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_numpy(name):
    cfg = CONFIGS[name]
    model, (tokens, context) = build(cfg, "unroll"), inputs()
    weights = {key: np.asarray(leaf, np.float64) for key, leaf in zip(parameter_table(model), jax.tree.leaves(model), strict=True)}
    want = reference(cfg, weights, tokens[0], context.positions[0], context.segments[0])
    got = logits(model, tokens, context)[0]
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5


# ------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("name", ["llama", "pattern", "sandwich", "post"])
def test_scan_equals_unroll(name):
    tokens, context = inputs()
    a, b = (logits(build(MECHANISMS[name], layers), tokens, context) for layers in ("scan", "unroll"))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "layers"), [("pattern", "scan"), ("pattern", "unroll"), ("sandwich", "scan"), ("post", "scan"), ("parallel", "scan")]
)
def test_cache_gives_the_full_forward(name, layers):
    model, (tokens, _) = build(MECHANISMS[name], layers), inputs()
    positions = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    ones = np.ones_like(positions)
    want = logits(model, tokens, Context(positions, ones))
    caches = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.cache_spec(12, 8))
    tables, none = jnp.array([[3, 1, 4, 11, 5], [9, 2, 6, 8, 7]]), jnp.zeros((0, 5), jnp.int32)
    run = jax.jit(lambda m, t, c, k: m(t, c, k))
    got = []
    for start, stop in ((0, 25), *((i, i + 1) for i in range(25, 40))):
        at = positions[:, start:stop]
        slots = (jnp.take_along_axis(tables, at // 8, axis=1) * 8 + at % 8).reshape(-1)
        pages = Pages(slots, none, tables) if start == 0 else Pages(slots, tables, none)
        rows = (x[:, start:stop].reshape(-1, 1) for x in (tokens, positions, ones))
        output = run(model, next(rows), Context(*rows, pages), caches)
        caches = output.caches
        got.append(model.logits(output.hidden).reshape(2, stop - start, -1))
    np.testing.assert_allclose(np.concatenate(got, 1), want, rtol=0, atol=5e-6)


def test_packed_documents_do_not_see_each_other():
    model, (tokens, context) = build(CONFIGS["pattern"], "unroll"), inputs()
    before = logits(model, tokens, context)
    other = tokens.copy()
    other[:, :13] = (other[:, :13] + 1) % 61
    after = logits(model, other, context)
    np.testing.assert_array_equal(before[:, 13:], after[:, 13:])
    assert np.abs(before[:, :13] - after[:, :13]).max() > 0.01


@pytest.mark.parametrize("policy", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_remat_changes_no_gradient(policy):
    tokens, context = inputs()
    loss = jax.jit(jax.grad(lambda m: jnp.sum(jnp.square(m.logits(m(tokens, context).hidden)))))
    plain, remat = (jax.tree.leaves(loss(build(CONFIGS["pattern"], "scan", schema.Remat(policy=p)))) for p in ("none", policy))
    for a, b in zip(plain, remat, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_parameter_table_knows_every_array(layers):
    model = Decoder(CONFIGS["pattern"].model_copy(update={"layers": layers}), F32, REMAT)
    table = parameter_table(model)
    assert len(table) == len(jax.tree.leaves(model))
    assert all(len(row.shape) == len(row.axes) for row in table.values())
    assert sum(row.size for row in table.values()) == sum(leaf.size for leaf in jax.tree.leaves(build(CONFIGS["pattern"], layers)))
