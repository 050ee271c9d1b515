"""Routers against token-by-token numpy code written from the papers, and the balancing terms against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.ops.routing import balance, balance_step, route

EXPERTS, TOKENS = 12, 40
SIZES = {"num_experts": EXPERTS, "experts_per_token": 3, "mlp": 8}
ROUTERS = {
    "Mixtral, Qwen3": schema.Moe(**SIZES),
    "OLMoE": schema.Moe(**SIZES, norm_topk=False),
    "DeepSeek-V2": schema.Moe(**SIZES, norm_topk=False, routed_scale=16.0, num_groups=4, groups_per_token=2),
    "DeepSeek-V3": schema.Moe(
        **SIZES, routing="sigmoid", routed_scale=2.5, num_groups=4, groups_per_token=2, group_score="top2", balance_rate=0.001
    ),
    "Kimi-K2": schema.Moe(**SIZES, routing="sigmoid", routed_scale=2.827, balance_rate=0.001),
    "sigmoid alone": schema.Moe(**SIZES, routing="sigmoid", norm_topk=False),
}


def oracle(cfg, logits, bias):
    """Experts and weights of one token, from its logits [experts] in float64."""
    scores = np.exp(logits) / np.exp(logits).sum() if cfg.routing == "softmax" else 1 / (1 + np.exp(-logits))
    choice, size = scores + bias, EXPERTS // cfg.num_groups
    groups = [sorted(choice[g * size : (g + 1) * size])[::-1] for g in range(cfg.num_groups)]
    of_group = [group[0] if cfg.group_score == "max" else group[0] + group[1] for group in groups]
    allowed = sorted(range(cfg.num_groups), key=lambda g: -of_group[g])[: cfg.groups_per_token]
    experts = sorted((e for e in range(EXPERTS) if e // size in allowed), key=lambda e: -choice[e])[: cfg.experts_per_token]
    weights = scores[experts]
    return experts, weights / (weights.sum() if cfg.norm_topk else 1) * cfg.routed_scale


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, TOKENS, EXPERTS)).astype(np.float32), rng.normal(size=EXPERTS).astype(np.float32) * 0.3


@pytest.mark.parametrize("name", ROUTERS)
def test_router_against_numpy(name):
    cfg, (logits, bias) = ROUTERS[name], draw()
    bias = bias if cfg.balance_rate is not None else None
    found = route(cfg, jnp.asarray(logits), None if bias is None else jnp.asarray(bias))
    changed = 0
    for row in range(2):
        for token in range(TOKENS):
            experts, weights = oracle(cfg, logits[row, token].astype(np.float64), 0 if bias is None else bias)
            assert experts == list(found.experts[row, token])
            np.testing.assert_allclose(found.weights[row, token], weights, rtol=1e-5)
            changed += set(experts) != set(np.argsort(-logits[row, token])[: cfg.experts_per_token])
    assert (changed > 0) == (cfg.num_groups > 1 or bias is not None)  # groups and bias do change the choice here


def test_softmax_over_the_chosen_is_the_normalised_softmax():
    """GPT-OSS takes the softmax of the chosen logits: `routing: softmax` with `norm_topk` is the same function."""
    logits = draw()[0]
    top, experts = jax.lax.top_k(jnp.asarray(logits), 3)
    found = route(ROUTERS["Mixtral, Qwen3"], jnp.asarray(logits))
    np.testing.assert_array_equal(found.experts, experts)
    np.testing.assert_allclose(found.weights, jax.nn.softmax(top, axis=-1), rtol=1e-6)


def test_bias_is_not_in_the_weights_and_gets_no_slope():
    cfg, (logits, bias) = ROUTERS["DeepSeek-V3"], draw()

    def weights(bias, logits):
        return jnp.sum(route(cfg, logits, bias).weights ** 2)

    d_bias, d_logits = jax.grad(weights, argnums=(0, 1))(jnp.asarray(bias), jnp.asarray(logits))
    assert not d_bias.any()
    assert d_logits.any()


def test_sigmoids_that_underflow_give_no_nan():
    found = route(ROUTERS["Kimi-K2"], jnp.full((1, 1, EXPERTS), -200.0), jnp.zeros(EXPERTS))
    assert not found.weights.any()


@pytest.mark.parametrize("name", ["Mixtral, Qwen3", "Kimi-K2"])
def test_auxiliary_and_z_loss_against_numpy(name):
    """Per sequence, over its real tokens only."""
    cfg = ROUTERS[name].model_copy(update={"aux_loss": 0.25, "router_z_loss": 0.5})
    logits, bias = draw(1)
    real = np.arange(TOKENS) < np.array([[TOKENS], [TOKENS // 3]])
    routing = route(cfg, jnp.asarray(logits), jnp.asarray(bias))
    found = balance(cfg, routing, jnp.asarray(real), jnp.asarray(bias))
    aux = z = 0.0
    for row in range(2):
        count, rows = real[row].sum(), logits[row, real[row]].astype(np.float64)
        scores = np.exp(rows) if cfg.routing == "softmax" else 1 / (1 + np.exp(-rows))
        probability = (scores / scores.sum(-1, keepdims=True)).mean(0)
        share = np.bincount(np.asarray(routing.experts[row])[real[row]].ravel(), minlength=EXPERTS) / (3 * count)
        aux += count * EXPERTS * (share * probability).sum()
        z += (np.log(np.exp(rows).sum(-1)) ** 2).sum()
    np.testing.assert_allclose([found.aux, found.z, found.loss], [aux, z, 0.25 * aux + 0.5 * z], rtol=1e-5)


def test_gradient_of_the_bias_is_the_load():
    """DeepSeek-V3's bias: counts of real tokens come back as its gradient, and the loss does not contain the bias."""
    cfg, (logits, bias) = ROUTERS["DeepSeek-V3"], draw(2)
    real = jnp.asarray(np.arange(TOKENS) < np.array([[TOKENS], [TOKENS // 3]]))
    routing = route(cfg, jnp.asarray(logits), jnp.asarray(bias))
    loss, counts = jax.value_and_grad(lambda b: balance(cfg, routing, real, b).loss)(jnp.asarray(bias))
    np.testing.assert_array_equal(counts, np.bincount(np.asarray(routing.experts)[np.asarray(real)].ravel(), minlength=EXPERTS))
    assert loss == balance(cfg, routing, real).loss


def test_step_of_the_bias():
    """Overloaded experts go down, starved ones up, an even load stays."""
    np.testing.assert_allclose(balance_step(jnp.array([[9.0, 5.0, 1.0, 5.0]]), 0.01), [[-0.01, 0.0, 0.01, 0.0]])
    assert not balance_step(jnp.full((160,), 7.0), 0.01).any()


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2"])
def test_bias_evens_out_the_load(name):
    """Steps of the bias make a skewed choice even."""
    cfg, rng = ROUTERS[name], np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(1, 2000, EXPERTS)) + rng.normal(size=EXPERTS), jnp.float32)
    real, bias, most = jnp.ones((1, 2000), bool), jnp.zeros(EXPERTS), []

    @jax.jit
    def step(bias):
        counts = jax.grad(lambda b: balance(cfg, route(cfg, logits, b), real, b).loss)(bias)
        return bias + balance_step(counts, 0.01), counts.max() / counts.mean()

    for _ in range(100):
        bias, skew = step(bias)
        most.append(float(skew))
    assert most[0] > 1.8
    assert most[-1] < 1.1
