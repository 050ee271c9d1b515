"""Operation counts against hand-made figures and against the parameters that are multiplied."""

import pytest

from maxtrain.config import schema
from maxtrain.models import flops


def test_visible_keys():
    assert flops.visible_keys(4, None) == (1 + 2 + 3 + 4) / 4
    assert flops.visible_keys(6, 2) == (1 + 2 + 2 + 2 + 2 + 2) / 6
    assert flops.visible_keys(3, 100) == 2


def test_matrices_cost_two_operations_a_parameter():
    cfg = schema.Model(vocab_size=100, embed=16, mlp=40, num_layers=3, num_heads=4, num_kv_heads=2)
    parts = flops.forward(cfg, 8)
    matrices = 3 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 40) + 100 * 16
    assert parts["projections"] + parts["feed_forward"] + parts["head"] == 2 * matrices
    assert parts["attention"] == 3 * 4 * 16 * 4.5  # 4.5 keys on average over 8 positions
    assert flops.training(cfg, 8) == 3 * sum(parts.values())


def test_experts_count_for_the_tokens_they_get():
    moe = schema.Moe(num_experts=8, experts_per_token=2, mlp=24)
    cfg = schema.Model(slots={"layer": schema.Slot(feed_forward="moe")}, moe=moe, num_layers=1)
    assert flops.forward(cfg, 8)["feed_forward"] == pytest.approx(2 * 64 * (2 * 3 * 24 + 8))


def test_shared_experts_count_for_every_token():
    moe = schema.Moe(num_experts=8, experts_per_token=2, mlp=24, shared_mlp=40, shared_gate=True)
    cfg = schema.Model(slots={"layer": schema.Slot(feed_forward="moe")}, moe=moe, num_layers=1)
    assert flops.forward(cfg, 8)["feed_forward"] == pytest.approx(2 * 64 * (2 * 3 * 24 + 3 * 40 + 8 + 1))


def test_latent_attention():
    mla = schema.Mla(q_rank=12, kv_rank=10, nope_dim=8, rope_dim=4, value_dim=6)
    cfg = schema.Model(embed=16, num_layers=1, num_heads=4, mla=mla)
    parts = flops.forward(cfg, 8)
    assert parts["projections"] == 2 * (16 * 12 + 12 * 4 * 12 + 16 * 14 + 10 * 4 * 14 + 4 * 6 * 16)
    assert parts["attention"] == 2 * 4 * (12 + 6) * 4.5
    without = schema.Model(embed=16, num_layers=1, num_heads=4, mla=mla.model_copy(update={"q_rank": None}))
    assert flops.forward(without, 8)["projections"] - parts["projections"] == 2 * (16 * 48 - 16 * 12 - 12 * 48)


def test_windows_are_counted():
    full, local = (schema.Model(num_layers=1, slots={"layer": schema.Slot(window=w)}) for w in (None, 16))
    assert flops.forward(local, 1024)["attention"] < flops.forward(full, 1024)["attention"] / 20
