"""How sequences are cut, and that what attention takes from memory grows with the length, not with its square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.ops.attention_tiles import SPAN, Spans, Tokens, near, visible_keys
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.ring_attention import balanced_order
from maxtrain.ops.split_attention import split_attention
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout


@pytest.mark.parametrize("length", [1, 5, 1000, 1025, 2048, 2049, 2100, 3000])
@pytest.mark.parametrize("window", [None, 1, 65, 600, 1024, 1500])
def test_every_pair_is_met_once_and_little_else(length, window):
    """Blocks and tiles together hold each key that a query sees once; all that they hold besides is at most a span a query."""
    spans = Spans.of(length, window)
    met = np.zeros((spans.length, spans.length + spans.halo), np.int8)
    for start in range(0, spans.length, spans.size):
        for rows, columns in spans.blocks(window):
            met[start + rows.start : start + rows.stop, start + columns.start : start + columns.stop] += 1
    met = met[:, spans.halo :]
    tiles = spans.earlier(window)
    for query, key in tiles.starts:
        met[query : query + tiles.queries, key : key + tiles.keys] += 1
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    assert met.max() == 1
    assert met[:length, :length][seen].all()
    assert met.sum() - seen.sum() <= SPAN * spans.length
    if window and 1 < window <= SPAN // 4:
        assert met.sum() <= (window + 64) * spans.length
    assert spans.length < 1.13 * length + 64


@pytest.mark.parametrize("window", [None, 3, 40])
def test_near_is_never_wrong_about_a_tile(window):
    """A tile that is left out has nothing visible, and one without a mask has all of it."""
    rng = np.random.default_rng(0)
    said = np.zeros(2, int)
    for _ in range(150):
        documents = rng.integers(1, 3)
        queries, keys = (
            Tokens(
                jnp.asarray(np.sort(rng.choice(96, 8, replace=False))[None] if apart else rng.integers(0, 88) + np.arange(8)[None]),
                jnp.asarray(np.sort(rng.integers(0, documents, (2, 8)))),
            )
            for apart in rng.integers(0, 2, 2)
        )
        visible = visible_keys(queries, keys, window)
        some, every = near(queries, keys, window)
        assert some or not visible.any()
        assert visible.all() or not every
        said += [not some, every]
    assert said.min() > 0 or window == 3
    assert said.max() < 150


def attention(options, sink, width, value_width, way):
    """(length) -> bytes of temporaries of value and gradients."""
    place = None
    if way is not None:
        cfg = schema.Mesh(fsdp=1, context=2)
        place = Layout(mesh.make_mesh(cfg, jax.devices()[:2]), cfg.rules, *way)

    def compiled(length):
        q, k, v, out = (
            jax.ShapeDtypeStruct((1, length, *shape), jnp.float32) for shape in ((4, width), (2, width), (2, value_width), (4, value_width))
        )
        sinks, segments = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)

        def gradients(q, k, v, out, sinks, segments):
            def forward(q, k, v, sinks):
                if way is None:
                    return causal_attention(q, k, v, segments, sinks if sink else None, options)
                return split_attention(q, k, v, segments, balanced_order(length), sinks if sink else None, options)

            y, back = jax.vjp(forward, q, k, v, sinks)
            return y, back(out)

        return jax.jit(gradients).lower(q, k, v, out, sinks, segments).compile().memory_analysis().temp_size_in_bytes

    def of(length):
        if place is None:
            return compiled(length)
        with sharding.use(place):
            return compiled(length)

    return of


FORMS = {  # options, sinks, width of keys and of values, exchange between two devices
    "full": (Options(), False, 16, 16, None),
    "window": (Options(window=100), False, 16, 16, None),
    "wide window": (Options(window=1500), False, 16, 16, None),
    "sinks": (Options(), True, 16, 16, None),
    "softcap": (Options(softcap=5.0), False, 16, 16, None),
    "latent": (Options(), False, 24, 16, None),
    "ring": (Options(), False, 16, 16, ("ring", False)),
    "balanced ring": (Options(), False, 16, 16, ("ring", True)),
    "ring, window": (Options(window=100), True, 16, 16, ("ring", True)),
    "all_to_all": (Options(), False, 16, 16, ("all_to_all", False)),
    "gather": (Options(), False, 16, 16, ("gather", False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_memory_of_attention_grows_with_the_length(name):
    """Documents are in the segments of each."""
    of = attention(*FORMS[name])
    assert of(8192) <= 2.2 * of(4096)
