"""Engines of tiny models, and switches that need no compilation."""

import contextlib
import functools
import threading

import jax
import numpy as np

from maxtrain.config import schema
from maxtrain.models.decoder import Decoder
from maxtrain.ops.attention import Context
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout, initialise, shardings
from maxtrain.serving.engine import Engine

SIZES = {"vocab_size": 61, "embed": 32, "mlp": 48, "num_layers": 3, "num_heads": 4, "max_length": 96, "init_scale": 3.0}
SERVE = {"max_requests": 6, "block": 8, "num_blocks": 4, "page_size": 4}


def config_of(axes=None, serve=None, layers="unroll", compute="float32", **model):
    """The config of a tiny model."""
    return schema.Config.model_validate(
        {
            "model": SIZES | {"layers": layers} | model,
            "precision": {"compute": compute},
            "mesh": {"fsdp": 1} | (axes or {}),
            "data": {"batch_size": 8, "length": 32, "tokenizer": {"kind": "huggingface", "path": "none"}},
            "serve": SERVE | (serve or {}),
        }
    )


def build(serve=None, devices=1, axes=None, layers="unroll", compute="float32", change=lambda model: model, **model):
    """An engine on random weights, which `change` may replace, and its model."""
    config = config_of(axes, serve, layers, compute, **model)
    layout = layout_of(config, devices)
    model = change(random_model(config, layout))
    with sharding.use(layout):
        return Engine(lambda: model, config, layout), model


def layout_of(config, devices=1):
    return Layout(mesh.make_mesh(config.mesh, jax.devices()[:devices]), config.mesh.rules)


def random_model(config, layout):
    """Random weights on a layout, the same for any."""
    described = Decoder(config.model, config.precision, schema.Remat(policy="none"))
    placed = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), described, shardings(described, layout))
    return initialise(placed, 5)


def logits(model, tokens):
    """Of the training forward: float64 [length, vocab]."""
    tokens = np.asarray(tokens, np.int32)[None]
    forward = _forward(tokens.shape[1])
    return np.asarray(forward(model, tokens), np.float64)[0]


@functools.cache
def _forward(length):
    def run(model, tokens):
        at = np.arange(length, dtype=np.int32)[None]
        return model.logits(model(tokens, Context(at, np.ones_like(at))).hidden)

    return jax.jit(run)


def padded_logits(model, tokens, length=96):
    """`logits` by one program for all lengths: what follows a token does not matter to it."""
    return logits(model, [*tokens, *[0] * (length - len(tokens))])[: len(tokens)]


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def run(engine, *requests):
    """Until all is done; the outputs."""
    while engine.busy:
        engine.step()
        engine.scheduler.check()
    return [request.tokens[len(request.prompt) :] for request in requests]


def within(action, seconds=60):
    """The result of an action, in a thread of its own that has so many seconds; raises what it raised."""
    found = []

    def run():
        try:
            found.append((action(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"still waiting after {seconds} s"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


@contextlib.contextmanager
def switched(engine, *, starved=False, chunked=False, overlap=True, prefix_cache=True, speculate=0):
    """The engine with other settings; `starved` leaves it a pool too small for what runs at once, `chunked` a block a step."""
    scheduler, serve, limits = engine.scheduler, engine.serve, engine.scheduler.limits
    scheduler.pool.forget_all()
    pages = scheduler.pool.take(max(0, scheduler.pool.num_free - 26)) if starved else []
    scheduler.limits = limits.__class__(limits.rows, 1, limits.block, limits.slots) if chunked else limits
    scheduler.prefix_cache, scheduler.draft = prefix_cache, engine._draft if speculate else None
    engine.serve = serve.model_copy(update={"overlap": overlap, "speculate": speculate})
    check, scheduler.check = scheduler.check, lambda: None
    try:
        yield
    finally:
        scheduler.pool.release(pages)
        engine.serve, scheduler.limits, scheduler.prefix_cache, scheduler.draft, scheduler.check = serve, limits, True, None, check
        scheduler.check()
