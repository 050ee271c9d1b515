"""The train step: the same numbers on any mesh and with any microbatches, and what is done about bad steps."""

import functools

import jax
import numpy as np
import pytest
from programs import BATCH, LENGTH, MODELS, batches, build, losses, make_config, norms, run

from maxtrain.config import schema
from maxtrain.parallel.sharding import is_param, kind
from maxtrain.training import state as states
from maxtrain.training.optimizer import make_schedule


@functools.cache
def one_device(model):
    return run(build(make_config(model), 2), batches(20))[0]


def assert_same(rows, reference):
    np.testing.assert_allclose(losses(rows), losses(reference), rtol=1e-5)
    np.testing.assert_allclose(norms(rows), norms(reference), rtol=1e-4)


# pairs of (devices, microbatches) for every kind of model; all of them in the long tier
SHORT = [("dense", 1, 2, 1), ("dense", 4, 1, 2), ("dense", 2, 4, 1), ("dropless", 2, 2, 2), ("dropless", 1, 8, 1), ("capacity", 8, 1, 1)]
SHORT += [("dense", 1, 1, 4), ("capacity", 1, 1, 4), ("dropless", 1, 1, 2)]
LONG = [(m, d, f, n) for m in MODELS for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for n in (1, 2, 4) if d * f * n <= BATCH and d * f * n > 1]


@pytest.mark.parametrize(("model", "data", "fsdp", "microbatches"), SHORT)
def test_mesh_and_microbatches_change_nothing(model, data, fsdp, microbatches):
    config = make_config(model, data=data, fsdp=fsdp, microbatches=microbatches)
    assert_same(run(build(config, 2), batches(20))[0], one_device(model))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data", "fsdp", "microbatches"), [case for case in LONG if case not in SHORT])
def test_mesh_and_microbatches_change_nothing_at_all(model, data, fsdp, microbatches):
    test_mesh_and_microbatches_change_nothing(model, data, fsdp, microbatches)


def test_scan_gives_the_unrolled_losses_and_checkpoint():
    slots = {"local": schema.Slot(window=9), "moe": schema.Slot(feed_forward="moe")}
    model = schema.Model(
        embed=32, mlp=64, num_layers=6, slots=slots, prefix=("local",), layer_pattern=("local", "moe"), moe=MODELS["dropless"].moe
    )
    results, saved, programs = {}, {}, {}
    for layers in ("scan", "unroll"):
        programs[layers] = build(make_config(model.model_copy(update={"layers": layers})))
        results[layers], state = run(programs[layers], batches(6))
        saved[layers] = states.stack(state)
    assert_same(results["scan"], results["unroll"])
    flat = {layers: jax.tree_util.tree_flatten_with_path(arrays) for layers, arrays in saved.items()}
    assert [(path, leaf.shape) for path, leaf in flat["scan"][0]] == [(path, leaf.shape) for path, leaf in flat["unroll"][0]]
    # what one saved, the other goes on from
    moved = states.unstack(saved["scan"], programs["unroll"].state)
    back = states.unstack(states.stack(moved), programs["scan"].state)
    for a, b in zip(jax.tree.leaves(states.stack(back)), jax.tree.leaves(saved["scan"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_initial_values_do_not_depend_on_the_mesh():
    first, second = (build(make_config(data=d, fsdp=f)) for d, f in ((1, 1), (2, 4)))
    for a, b in zip(*(jax.tree.leaves(p.create(3).model) for p in (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_name_changes_nothing():
    renamed = make_config(run=schema.Run(name="deepseek3-llama3.1"))
    np.testing.assert_array_equal(losses(run(build(renamed, 2), batches(5))[0]), losses(one_device("dense"))[:5])


def test_sources_add_up():
    for row in one_device("dense"):
        np.testing.assert_allclose(row["loss_by_source"].sum(), row["loss"], rtol=1e-6)
        assert row["tokens_by_source"].sum() == row["tokens"]


def test_positions_without_weight_have_no_influence():
    given = batches(1)[0]
    changed = given | {"targets": np.where(given["weights"] == 0, 7, given["targets"])}
    program = build(make_config())
    (a,), state_a = run(program, [given])
    (b,), state_b = run(program, [changed])
    assert a["loss"] == b["loss"]
    for x, y in zip(jax.tree.leaves(state_a.model), jax.tree.leaves(state_b.model), strict=True):
        np.testing.assert_array_equal(x, y)


def test_custom_loss():
    def loss_fn(model, batch):
        total = sum((leaf**2).sum() for leaf in jax.tree.leaves(model))
        return total, {"tokens": batch["weights"].sum(), "loss": total}

    rows, _ = run(build(make_config(), loss_fn=loss_fn), batches(5))
    assert rows[-1]["loss"] < rows[0]["loss"]


# --------------------------------------------------------------------------------------------- optimizer, schedule


def test_adamw_against_numpy():
    """Adam with bias correction, decay of matrices only, global clipping; the gradient is that of sum(p * c) + sum(p^2) / 2."""
    optimizer = schema.Optimizer(clip_norm=0.5, weight_decay=0.2)
    config = make_config(optimizer=optimizer)

    def loss_fn(model, batch):
        total = sum(((leaf * 0.3).sum() + (leaf**2).sum() / 2) for leaf in jax.tree.leaves(model))
        return total * batch["weights"].sum(), {"tokens": batch["weights"].sum(), "loss": total}

    program = build(config, loss_fn=loss_fn)
    state = program.create(0)
    leaves = jax.tree.leaves(state.model, is_leaf=is_param)
    decays = [kind(leaf.get_metadata("axes")) == "matrix" for leaf in leaves]
    assert sum(decays) == 2 * 7  # q, k, v, out, gate, up, down of two layers: no norm, no embedding
    values = [np.asarray(leaf.get_value(), np.float64) for leaf in leaves]
    moments = [(np.zeros_like(v), np.zeros_like(v)) for v in values]
    rates = [1e-3 * min(1, (i + 1) / 4) * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * max(0, i - 4) / 16))) for i in range(6)]
    for i, lr in enumerate(rates):
        grads = [0.3 + v for v in values]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1, 0.5 / norm) for g in grads]
        for j, (g, decay) in enumerate(zip(grads, decays, strict=True)):
            m, v = 0.9 * moments[j][0] + 0.1 * g, 0.95 * moments[j][1] + 0.05 * g * g
            moments[j] = m, v
            direction = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-8)
            values[j] = values[j] - lr * (direction + (0.2 * values[j] if decay else 0))
    rows, state = run(program, batches(6), state)
    np.testing.assert_allclose([row["lr"] for row in rows], rates, rtol=1e-5)
    for want, got in zip(values, jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "want"),
    [
        (schema.Schedule(kind="constant", learning_rate=1.0), [1.0, 1.0, 1.0]),
        (schema.Schedule(kind="constant", learning_rate=1.0, warmup_steps=4), [0.25, 1.0, 1.0]),
        (schema.Schedule(kind="cosine", learning_rate=1.0, final_fraction=0.0), [1.0, 0.5, 0.0]),
        (schema.Schedule(kind="wsd", learning_rate=2.0, decay_steps=20, final_fraction=0.5), [2.0, 2.0, 1.0]),
    ],
)
def test_schedules(section, want):
    schedule = make_schedule(section, 100)
    np.testing.assert_allclose([schedule(np.int32(step)) for step in (0, 50, 100)], want, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- guard


def poisoned(loss_of):
    """A loss that is `loss_of(plain loss, batch)`."""
    plain = build(make_config()).loss_fn

    def loss_fn(model, batch):
        total, sums = plain(model, batch)
        factor = loss_of(batch)
        return total * factor, sums | {"loss": sums["loss"] * factor}

    return loss_fn


@pytest.mark.parametrize(("factor", "counted"), [(float("nan"), 10), (float("inf"), 10), (50.0, 9)])
def test_bad_steps_leave_the_state_alone(factor, counted):
    """Token 257 marks the bad batch. A finite spike is only known once the window of recent steps is full."""
    config = make_config(guard=schema.Guard(window=8, spike_sigmas=6.0))
    bad = poisoned(lambda batch: jax.numpy.where((batch["tokens"] == 257).any(), factor, 1.0))
    program = build(config, loss_fn=bad)
    given = list(batches(10))
    early, state = run(program, given[:counted])
    assert not any(row["skipped"] for row in early)
    before = jax.device_get((state.model, state.opt_state))
    marked = given[9] | {"tokens": np.full((BATCH, LENGTH), 257, np.int32)}
    (row, again), after = run(program, [marked, marked], state)
    assert (row["skipped"], row["skipped_in_a_row"], again["skipped_in_a_row"]) == (True, 1, 2)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((after.model, after.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.guard.counted)) == (counted + 2, counted)
    (row,), _ = run(program, [given[0]], after)
    assert (row["skipped"], row["skipped_in_a_row"]) == (False, 0)


def test_spikes_pass_when_switched_off():
    bad = poisoned(lambda batch: jax.numpy.where((batch["tokens"] == 257).any(), 50.0, 1.0))
    program = build(make_config(guard=schema.Guard(window=8, spike_sigmas=None)), loss_fn=bad)
    marked = batches(1)[0] | {"tokens": np.full((BATCH, LENGTH), 257, np.int32)}
    rows, _ = run(program, [*batches(9), marked])
    assert not rows[-1]["skipped"]


# --------------------------------------------------------------------------------------------------------- compile


def test_scan_compiles_one_period_whatever_the_depth():
    sizes = []
    for depth in (4, 16, 64):
        model = MODELS["dense"].model_copy(update={"layers": "scan", "num_layers": depth})
        sizes.append(len(build(make_config(model)).lower_step().as_text().splitlines()))
    assert max(sizes) - min(sizes) < 0.01 * min(sizes)
