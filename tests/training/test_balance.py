"""DeepSeek-V3's balancing bias: it moves by its own rule, the same on any mesh and with any microbatches, and nothing else moves it."""

import functools

import jax
import numpy as np
import pytest
from programs import BATCH, EXPERTS, LENGTH, MOE, build, decided_batches, make_config, norms, run

from maxtrain.config import schema
from maxtrain.parallel.sharding import parameter_table

RATE, NAME = 0.02, "body/layers/0/feed_forward/balance_bias"
EXTRAS = {"routing": "sigmoid", "balance_rate": RATE, "shared_mlp": 24, "router_z_loss": 1e-3, "dispatch": "capacity"}
MODEL = schema.Model(embed=32, layers="scan", moe=schema.Moe(**EXPERTS, **EXTRAS), **MOE)


@functools.cache
def steady():
    return decided_batches(MODEL, 6)


def biases(state):
    return np.asarray(dict(zip(parameter_table(state.model), jax.tree.leaves(state.model), strict=True))[NAME])


@functools.cache
def program():
    return build(make_config(MODEL), 2)


@functools.cache
def one_device():
    rows, state = run(program(), steady())
    return norms(rows), biases(state)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "microbatches"), [(2, 2, 2), (1, 1, 4), (1, 2, 4), (2, 1, 2), (4, 1, 1), (2, 2, 1)])
def test_mesh_and_microbatches_do_not_change_the_bias(data, fsdp, microbatches, **keys):
    rows, state = run(build(make_config(MODEL, data=data, fsdp=fsdp, microbatches=microbatches, **keys), 2), steady())
    np.testing.assert_array_equal(biases(state), one_device()[1])
    np.testing.assert_allclose(norms(rows), one_device()[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"stage": 2}, {"stage": 2, "expert": 2}])
def test_stages_do_not_change_the_bias(axes):
    """Tokens are counted where they are real: none in the steps in which a stage waits."""
    test_mesh_and_microbatches_do_not_change_the_bias(1, 1, 2, axes=axes)


def test_each_bias_goes_towards_balance_by_one_step():
    state, batch = program().create(0), steady()[0]
    assert not biases(state).any()
    grads = jax.jit(jax.grad(lambda model: program().loss_fn(model, batch)[0]))(state.model)
    counts = grads.body.layers[0].feed_forward.balance_bias.get_value()
    assert (counts.sum(axis=-1) == batch["tokens"].size * EXPERTS["experts_per_token"]).all()
    assert (counts == counts.round()).all()
    want = RATE * np.sign(counts.mean(axis=-1, keepdims=True) - counts)
    _, state = run(program(), [batch], state)
    np.testing.assert_array_equal(biases(state), want)
    assert np.abs(one_device()[1]).max() > 1.5 * RATE  # six steps: it does not stop at the first


def test_norm_decay_and_optimizer_leave_the_bias_alone():
    """With a rate of zero the bias stays, though all is decayed; its counts are in no norm, no clipping and no moment."""
    frozen = MODEL.model_copy(update={"moe": MODEL.moe.model_copy(update={"balance_rate": 0.0})})
    decayed = schema.Optimizer(decay=("matrix", "bias", "norm", "embedding"), weight_decay=0.5)
    (row,), state = run(build(make_config(frozen, optimizer=decayed), 2), steady()[:1])
    assert not biases(state).any()
    np.testing.assert_allclose(row["grad_norm"], one_device()[0][0], rtol=1e-6)
    assert row["grad_norm"] < 10 < BATCH * LENGTH / 4  # a count in it would be seen
    moments = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    assert not any(np.asarray(leaf).any() for path, leaf in moments if "balance_bias" in str(path))


def test_a_skipped_step_does_not_move_the_bias():
    _, state = run(program(), steady()[:1])
    before = biases(state)
    (row,), state = run(program(), [steady()[1] | {"weights": np.full((BATCH, LENGTH), np.nan, np.float32)}], state)
    assert row["skipped"]
    np.testing.assert_array_equal(biases(state), before)
    assert before.any()
