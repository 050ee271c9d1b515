"""Guesses of multi-token prediction: what they are, that they are taken when true, and that no token changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import build, run

from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.ops.attention import Context
from maxtrain.parallel.sharding import path_name

COUNT = 3
MLA = {"mla": {"q_rank": 24, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}}
GQA = {"num_kv_heads": 2}


def knowing(noise):
    """Weights with which a token decides what follows, and the module knows that; `noise` makes it err."""

    def one(path, leaf, embedding):
        name = path_name(path)
        if name.endswith(("attention/out", "feed_forward/down")):
            return leaf * noise if name.startswith("mtp/") else jnp.zeros_like(leaf)
        if name == "head":
            return jnp.roll(embedding, 7, axis=0)
        if name == "mtp/0/projection":
            exact = jnp.concatenate([jnp.eye(leaf.shape[1]), jnp.zeros((leaf.shape[1], leaf.shape[1]))])
            return exact + noise * jax.random.normal(jax.random.key(1), leaf.shape)
        return leaf

    def change(model):
        embedding = model.embedding.get_value()
        leaves, tree = jax.tree_util.tree_flatten_with_path(model)
        return jax.tree.unflatten(tree, [jax.device_put(one(path, leaf, embedding), leaf.sharding) for path, leaf in leaves])

    return change


def speculating(noise, speculate=COUNT, serve=None, **more):
    return build({"speculate": speculate} | (serve or {}), change=knowing(noise), tie_embeddings=False, mtp={"num_layers": 1}, **more)


def expected(model, tokens):
    """The guesses behind known tokens, by the training forward of the module on its own guesses."""
    hidden = np.zeros((1, 96, model.cfg.embed), np.float32)
    known, guesses = list(tokens), []
    hidden[0, : len(known) - 1] = forward(model, pad(known))[0, : len(known) - 1]
    for _ in range(COUNT):
        at = len(known) - 2  # the module's hidden state here predicts what follows the last known token
        further, logits = ahead(model, pad(known[1:]), hidden)
        guesses.append(int(np.argmax(logits[0, at])))
        hidden[0, at + 1] = further[0, at]
        known.append(guesses[-1])
    return guesses


def pad(tokens):
    return np.asarray([[*tokens, *[0] * (96 - len(tokens))]], np.int32)


context = Context(np.arange(96, dtype=np.int32)[None], np.ones((1, 96), np.int32))
forward = jax.jit(lambda model, tokens: model(tokens, context).hidden)


@jax.jit
def ahead(model, tokens, hidden):
    hidden = model.ahead(0, tokens, hidden, context).hidden
    return hidden, model.logits(hidden)


MODELS = {"gqa": GQA, "latent": MLA, "window": GQA | {"slots": {"layer": {"window": 7}}}}


ONE_SHAPE = ("gqa", {"deterministic": True})  # a program, of the eight or so


@pytest.mark.parametrize(("name", "serve"), [ONE_SHAPE, *(pytest.param(name, {}, marks=pytest.mark.slow) for name in MODELS)])
def test_guesses_are_those_of_the_training_forward(name, serve):
    """Where some come true and some do not, after prompts of one token to several blocks, in every step."""
    engine, model = speculating(0.25, serve=serve, **MODELS[name])
    rng, seen = np.random.default_rng(0), 0
    requests = [engine.add(rng.integers(0, 61, n).tolist(), SamplingParams(temperature=0, max_tokens=12)) for n in (1, 7, 19, 40)]
    while engine.busy:
        engine.step()
        for request in requests:
            if request.data.guesses and request.finish_reason is None and request.pending == 0:
                left = len(request.prompt) + 12 - len(request.tokens)  # what is guessed beyond is never used
                assert list(request.data.guesses[:left]) == expected(model, request.tokens)[:left]
                seen += 1
    assert seen >= 12
    assert 0.1 < engine.stats.accepted / engine.stats.guessed < 0.9


ASKED = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=1.5, seed=3, max_tokens=20),
    SamplingParams(temperature=1.0, top_k=5, seed=4, max_tokens=20),
    SamplingParams(temperature=1.0, top_p=0.7, seed=5, max_tokens=19, logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=20),
]


def answers(engine):
    prompts = [np.random.default_rng(n).integers(0, 61, 5 + 4 * n).tolist() for n in range(len(ASKED))]
    requests = [engine.add(prompt, params) for prompt, params in zip(prompts, ASKED, strict=True)]
    tokens = run(engine, *requests)
    return tokens, [[value for value, _ in request.data.logprobs] for request in requests]


@pytest.mark.slow
def test_true_guesses_are_all_taken_and_no_token_changes():
    """Also with noise: the module draws with the noise that its guess is checked with."""
    engine, _ = speculating(0.0, **GQA)
    tokens, logprobs = answers(engine)
    assert engine.stats.accepted == engine.stats.guessed > 40
    plain, _ = speculating(0.0, speculate=0, **GQA)
    want, want_logprobs = answers(plain)
    assert tokens == want
    for got, expected in zip(logprobs, want_logprobs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("serve", [{"deterministic": True}, {"prefix_cache": False, "overlap": False}, {"page_size": 2}])
def test_other_ways_to_serve_change_no_token(serve):
    engine, _ = build({"speculate": 2} | serve, change=knowing(0.25), tie_embeddings=False, mtp={"num_layers": 1}, **GQA)
    plain, _ = speculating(0.25, speculate=0, **GQA)
    assert answers(engine)[0] == answers(plain)[0]
    assert 0 < engine.stats.accepted < engine.stats.guessed


@pytest.mark.slow
def test_guesses_on_eight_devices():
    engine, _ = speculating(0.25, devices=8, axes={"fsdp": 2, "tensor": 4}, vocab_size=64, **MLA)
    single, _ = speculating(0.25, vocab_size=64, **MLA)
    assert answers(engine)[0] == answers(single)[0]
    assert (engine.stats.accepted, engine.stats.guessed) == (single.stats.accepted, single.stats.guessed)


def test_a_model_without_prediction_is_refused():
    with pytest.raises(Refused, match=r"serve\.draft=mtp: the model has no multi-token prediction"):
        build({"speculate": 2, "draft": "mtp"}, **GQA)
