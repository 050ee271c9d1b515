"""How the next tokens are chosen, for all rows of a step at once (`config.serving.SamplingParams`).

Nothing is sorted: top-k, top-p and min-p are thresholds on the logit, found by bisection over the bits of a float, and tokens
that tie with the last one kept are kept. Noise is a function of a request's seed and the index of the token, so a sample depends
neither on its slot nor on what else is in the batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.config.serving import MAX_LOGPROBS

# A row of state per slot: how often a token was generated, with a bit that it stands in the prompt and one that it ends the text
GENERATED, PROMPT, STOP = (1 << 24) - 1, 1 << 24, 1 << 25


class Rows(NamedTuple):
    """What the rows of a step ask for, each array [rows]; `NEUTRAL` asks for nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    seed: Any
    index: Any
    """How many tokens the request has generated before."""
    hold: Any
    """Whether tokens that end the text are not to be generated yet."""
    marked: Any
    """Whether counts or bias of the slot change the logits."""
    tops: Any
    """Whether the likeliest tokens are asked for."""


NEUTRAL = Rows(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, False, False, False)
DTYPES = Rows(*["float32", "int32", *["float32"] * 5, "uint32", "int32", *["bool"] * 3])


class Sampled(NamedTuple):
    """token int32 [rows]; logprob float32 [rows], of the model alone; ids and logprobs [rows, MAX_LOGPROBS] of the likeliest."""

    token: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, rows: Rows, owners: jax.Array, counts: jax.Array, bias: jax.Array, valid: int) -> Sampled:
    """A token for each row.

    Args:
        logits: float32 [rows, vocab], of the model alone.
        rows: what is asked for.
        owners: int32 [rows], the slot of each row.
        counts: int32 [slots, vocab], `GENERATED`, `PROMPT` and `STOP`.
        bias: float32 [slots, vocab], added to the logits; -inf for tokens that are ruled out.
        valid: number of ids that mean a token; the rest of the vocabulary is padding.
    """
    adjusted = jnp.where(jnp.arange(logits.shape[-1]) < valid, logits, -jnp.inf)

    def marked(logits: jax.Array) -> jax.Array:
        return _adjusted(logits, rows, counts[owners], bias[owners])

    adjusted = jax.lax.cond(jnp.any(rows.marked), marked, lambda logits: logits, adjusted)
    token = jax.lax.cond(jnp.any(rows.temperature > 0), _drawn, lambda logits, _: jnp.argmax(logits, axis=-1), adjusted, rows)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - log_total
    return Sampled(token.astype(jnp.int32), logprob, *top_logprobs(logits, log_total, jnp.any(rows.tops)))


def top_logprobs(logits: jax.Array, log_total: jax.Array, asked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and log-probabilities [rows, MAX_LOGPROBS] of the likeliest tokens, zeros unless they are asked for."""
    count = min(MAX_LOGPROBS, logits.shape[-1])
    shape = (len(logits), count)

    def found(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logits, count)
        return ids.astype(jnp.int32), values - log_total[:, None]

    return jax.lax.cond(asked, found, lambda _: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)), logits)


def _adjusted(logits: jax.Array, rows: Rows, counts: jax.Array, bias: jax.Array) -> jax.Array:
    """Logits with penalties and bias; those of a row that is not marked, whose slot may hold another request's, as they are."""
    before = logits
    generated = (counts & GENERATED).astype(jnp.float32)
    seen = (counts & (GENERATED | PROMPT)) != 0
    penalty = rows.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= rows.presence[:, None] * (generated > 0) + rows.frequency[:, None] * generated
    logits = jnp.where(rows.hold[:, None] & ((counts & STOP) != 0), -jnp.inf, logits + bias)
    return jnp.where(rows.marked[:, None], logits, before)


def _drawn(logits: jax.Array, rows: Rows) -> jax.Array:
    """Tokens drawn at each row's temperature; the likeliest where it is 0."""
    warm = rows.temperature > 0
    scaled = logits / jnp.where(warm, rows.temperature, 1.0)[:, None]
    restricted = jnp.any(warm & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)))
    scaled = jax.lax.cond(restricted, _restricted, lambda scaled, _: scaled, scaled, rows)

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), logits.shape[-1:])

    noisy = scaled + jax.vmap(noise)(rows.seed, rows.index)
    return jnp.argmax(jnp.where(warm[:, None], noisy, logits), axis=-1)


def _restricted(logits: jax.Array, rows: Rows) -> jax.Array:
    """Logits with what min-p, top-k and top-p leave out at -inf."""
    top = logits.max(axis=-1, keepdims=True)
    shares = jnp.exp(logits - top)  # of the likeliest token's probability
    kept = shares >= rows.min_p[:, None]
    k = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[-1]).astype(jnp.float32)
    kept &= _highest(logits, kept.astype(jnp.float32), k)
    mass = shares * kept
    kept &= _highest(logits, mass, rows.top_p * mass.sum(axis=-1)) | (rows.top_p >= 1)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _highest(values: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """Which of values [rows, n] are the highest ones whose weights sum to `enough` [rows]; all if they do not.

    The bits of a float, read as an integer with the sign turned, are in the order of floats: one bit of the threshold is settled
    at a time.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    ordered = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))

    def settle(index: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        total = jnp.sum(jnp.where(ordered >= tried[:, None], weights, 0), axis=-1)
        return jnp.where(total >= enough, tried, found)

    found = jax.lax.fori_loop(0, 32, settle, jnp.zeros(len(values), jnp.uint32))
    return ordered >= found[:, None]
