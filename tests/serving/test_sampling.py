"""Sampling against a plain numpy reading of each parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxtrain import SamplingParams
from maxtrain.serving.sampling import DTYPES, GENERATED, NEUTRAL, PROMPT, STOP, Rows, sample

VOCAB, VALID = 50, 47


def rows(count, **asked):
    made = Rows(*(np.full(count, value, dtype) for value, dtype in zip(NEUTRAL, DTYPES, strict=True)))
    return made._replace(**{name: np.asarray(value, getattr(DTYPES, name)) for name, value in asked.items()})


def draw(logits, asked, counts=None, bias=None):
    counts = np.zeros((len(logits), VOCAB), np.int32) if counts is None else counts
    bias = np.zeros((len(logits), VOCAB), np.float32) if bias is None else bias
    return jax.jit(sample, static_argnums=5)(logits, asked, np.arange(len(logits)), counts, bias, VALID)


def support(logits, count=4000, **asked):
    """The tokens that are ever drawn from one row, with their shares."""
    many = np.tile(logits, (count, 1))
    asked = rows(count, index=np.arange(count), **{name: np.full(count, value) for name, value in asked.items()})
    token = draw(many, asked).token
    return np.bincount(token, minlength=VOCAB) / count


def kept_by(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The shares that a numpy reading of the parameters gives."""
    scaled = logits[:VALID].astype(np.float64) / temperature
    shares = np.exp(scaled - scaled.max())
    shares[shares < min_p * shares.max()] = 0
    if top_k:
        shares[shares < np.sort(shares)[-top_k]] = 0
    order = np.argsort(-shares)
    before = np.cumsum(shares[order]) - shares[order]
    shares[order[before >= top_p * shares.sum()]] = 0
    return np.pad(shares / shares.sum(), (0, VOCAB - VALID))


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.3, "min_p": 0.3},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_tokens_are_drawn_from_what_the_parameters_leave(asked):
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
    logits[VALID:] = 50  # padding of the vocabulary is never drawn
    got, want = support(logits, **asked), kept_by(logits, **asked)
    assert not (got[want == 0]).any()
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / 4000))


def test_ties_with_the_last_of_top_k_stay():
    logits = np.full(VOCAB, -5, np.float32)
    logits[[3, 4, 5]] = [2, 1, 1]
    assert set(np.flatnonzero(support(logits, temperature=1.0, top_k=2))) == {3, 4, 5}


def test_noise_depends_on_seed_and_index_only():
    logits = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32)
    alone = [int(draw(logits, rows(1, temperature=[1.0], seed=[seed], index=[3])).token[0]) for seed in range(8)]
    order = np.random.default_rng(2).permutation(8)
    together = draw(np.tile(logits, (8, 1)), rows(8, temperature=np.ones(8), seed=order, index=np.full(8, 3))).token
    np.testing.assert_array_equal(together, np.array(alone)[order])
    assert len(set(alone)) > 3


def test_penalties_bias_and_ends():
    logits = np.random.default_rng(3).normal(size=(5, VOCAB)).astype(np.float32)
    counts, bias = np.zeros((5, VOCAB), np.int32), np.zeros((5, VOCAB), np.float32)
    counts[:, 7], counts[:, 8], counts[:, 9] = 3, PROMPT, STOP
    counts[:, 10] = PROMPT | 1
    bias[4, :40] = -np.inf
    asked = rows(
        5, marked=np.ones(5), repetition=[1.7, 1, 1, 1, 1], presence=[0, 0.9, 0, 0, 0], frequency=[0, 0, 0.4, 0, 0], hold=[0, 0, 0, 1, 0]
    )
    adjusted = logits.astype(np.float64)
    for token in (7, 8, 10):
        adjusted[0, token] = adjusted[0, token] / 1.7 if adjusted[0, token] > 0 else adjusted[0, token] * 1.7
    adjusted[1, [7, 10]] -= 0.9
    adjusted[2, 7] -= 1.2
    adjusted[2, 10] -= 0.4
    adjusted[3, 9] = -np.inf
    adjusted[4, :40] = -np.inf
    for lifted in (7, 8, 9, 10):  # each token in turn is the likeliest by less than its penalty
        raised, wanted = logits.copy(), adjusted.copy()
        rise = logits[:, :VALID].max(axis=1) + 0.3 - logits[:, lifted]
        raised[:, lifted] += rise
        plain = raised[0, lifted]
        wanted[:, lifted] += rise
        wanted[0, lifted] = (plain / 1.7 if plain > 0 else plain * 1.7) if lifted in (7, 8, 10) else plain
        got = draw(raised, asked, counts, bias)
        np.testing.assert_array_equal(got.token, wanted[:, :VALID].argmax(axis=1))
        total = np.log(np.exp(raised.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(got.logprob, raised[np.arange(5), got.token] - total, rtol=1e-5)  # of the model alone
    assert GENERATED < PROMPT < STOP


def test_likeliest_tokens_come_only_when_asked_for():
    logits = np.random.default_rng(4).normal(size=(2, VOCAB)).astype(np.float32)
    got = draw(logits, rows(2, tops=[False, True]))
    want = np.argsort(-logits, axis=1)[:, :20]
    np.testing.assert_array_equal(got.top_ids, want)
    np.testing.assert_allclose(got.top_logprobs, jnp.take_along_axis(jax.nn.log_softmax(logits), want, 1), rtol=1e-5)
    assert not draw(logits, rows(2)).top_ids.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 2.0}, "less than or equal to 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"n": 2, "temperature": 0.0}, "same output each time"),
        ({"temperature": 0.0, "top_k": 3}, "top_k has no effect with temperature=0"),
        ({"allowed_token_ids": []}, "no token could be generated"),
        ({"include_stop": True}, "no effect without stop"),
        ({"stop": [""]}, "at least 1 character"),
        ({"logprobs": 21}, "less than or equal to 20"),
        ({"topk": 3}, "Extra inputs"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        SamplingParams(**values)


def test_parameters_survive_json():
    params = SamplingParams(stop="x", logit_bias={3: 1.5}, stop_token_ids=[1, 2])
    assert SamplingParams.model_validate(params.model_dump(mode="json")) == params
    assert params.stop == ("x",)
