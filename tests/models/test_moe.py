"""Experts: both dispatches against one another and against numpy, with every extra a family has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.models.moe import MoeMlp
from maxtrain.ops.routing import route
from maxtrain.parallel.sharding import initialise, kind, parameter_table

MOE = {"num_experts": 6, "experts_per_token": 2, "mlp": 10}
CASES = {
    "plain": ({}, "silu"),
    "GPT-OSS": ({"router_bias": True, "expert_bias": True}, "clamped_swiglu"),
    "DeepSeek-V3": (
        {"routing": "sigmoid", "num_groups": 3, "groups_per_token": 2, "group_score": "top2", "balance_rate": 0.01, "shared_mlp": 14},
        "silu",
    ),
    "Qwen2-MoE": ({"norm_topk": False, "shared_mlp": 14, "shared_gate": True}, "silu"),
}


def build(case, **keys):
    extra, activation = CASES[case]
    cfg = schema.Model(
        embed=16, activation=activation, slots={"layer": schema.Slot(feed_forward="moe")}, moe=schema.Moe(**MOE, **extra, **keys)
    )
    model = initialise(MoeMlp(cfg, "float32"), 0)
    rng = np.random.default_rng(0)  # biases begin at zero: draw them, and stretch the rest into the clamps
    return jax.tree.map(lambda p: jnp.asarray(2.0 * rng.normal(size=p.shape), jnp.float32) if p.ndim < 3 else 4 * p, model)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated(gate, up, activation):
    if activation == "silu":
        return gate * sigmoid(gate) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("case", CASES)
def test_output_against_numpy(case, dispatch):
    keys = {"dispatch": dispatch, "capacity_factor": 6.0} if dispatch == "capacity" else {}
    model = build(case, **keys)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 16)), jnp.float32)
    segments = np.where(np.arange(9) < 7, 1, 0) * np.ones((2, 1), np.int32)
    got, _ = jax.jit(lambda m: m(x, segments))(model)
    w = {name: np.asarray(leaf, np.float64) for name, leaf in zip(parameter_table(model), jax.tree.leaves(model), strict=True)}
    activation, none = CASES[case][1], np.zeros(6)
    logits = np.asarray(x, np.float64) @ w["router"] + w.get("router_bias", 0)
    routing = route(model.cfg, jnp.asarray(logits, jnp.float32), None if model.balance_bias is None else model.balance_bias.get_value())
    for row in range(2):
        for token in range(7):
            want, h = np.zeros(16), np.asarray(x[row, token], np.float64)
            for weight, e in zip(routing.weights[row, token], routing.experts[row, token], strict=True):
                gate, up = (h @ w[n][e] + w.get(f"{n}_bias", none)[e] for n in ("gate", "up"))
                want += float(weight) * (gated(gate, up, activation) @ w["down"][e] + w.get("down_bias", none)[e])
            if "shared/gate" in w:
                shared = gated(h @ w["shared/gate"], h @ w["shared/up"], activation) @ w["shared/down"]
                want += shared * (sigmoid(h @ w["shared_gate"]) if "shared_gate" in w else 1)
            np.testing.assert_allclose(got[row, token], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_kinds_of_parameters():
    """Weight decay takes matrices: no bias of a router or an expert, and never the balancing bias."""
    kinds = {name: kind(p.axes) for case in CASES for name, p in parameter_table(build(case)).items()}
    biases = {"router_bias", "gate_bias", "up_bias", "down_bias"}
    assert {name for name, k in kinds.items() if k == "bias"} == biases
    assert {name for name, k in kinds.items() if k == "balance"} == {"balance_bias"}
    assert {k for name, k in kinds.items() if name not in biases | {"balance_bias"}} == {"matrix"}
