"""The schedule of the pipeline alone: against a plain loop, step by step, and how long stages wait."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.pipeline import Timetable, by_stage, pipeline, timetable
from maxtrain.parallel.sharding import Layout
from maxtrain.training import dry_run

WIDTH = 6
TABLES = [Timetable(1, 3), Timetable(2, 2), Timetable(2, 6), Timetable(4, 4), Timetable(4, 12), Timetable(3, 9)]
TABLES += [Timetable(2, 2, 2), Timetable(2, 8, 3), Timetable(4, 4, 2), Timetable(4, 8, 2), Timetable(3, 6, 4), Timetable(4, 12, 3)]


def layer(params, x):
    """Not commuting with another, so that their order is seen."""
    values, numbers = x
    return jnp.tanh(values @ params["w"] + params["b"]) + jnp.cos(numbers[:, None]), numbers


def drawn(table):
    rng = np.random.default_rng(0)
    shape = (table.stages, table.repeats)
    params = {"w": rng.normal(size=(*shape, WIDTH, WIDTH)), "b": rng.normal(size=(*shape, WIDTH))}
    x = rng.normal(size=(table.microbatches, 5, WIDTH)), rng.integers(0, 9, (table.microbatches, 5))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32), (params, x))


def stage_fn(params, repeat, x):
    values, numbers = layer(jax.tree.map(lambda p: p[repeat], params), x)
    return (values, numbers), {"square": (values**2).sum(), "count": jnp.ones(())}


def looped(params, x, table):
    """Every microbatch through all stages, as often as there are repeats."""
    made, sums = [], []
    for m in range(table.microbatches):
        one = jax.tree.map(lambda a, m=m: a[m], x)
        for repeat in range(table.repeats):
            for stage in range(table.stages):
                one, extra = stage_fn(jax.tree.map(lambda p, stage=stage: p[stage], params), repeat, one)
                sums.append(extra)
        made.append(one)
    return jax.tree.map(lambda *a: jnp.stack(a), *made), jax.tree.map(lambda *a: sum(a), *sums)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_values_and_gradients_are_those_of_a_loop(table):
    params, x = drawn(table)

    def loss(run):
        def function(params, values):
            (made, numbers), sums = run(params, (values, x[1]))
            weights = jnp.arange(made.size).reshape(made.shape) / made.size
            return (weights * made).sum() + sums["square"], (made, numbers, sums)

        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(params, x[0])

    found = loss(lambda params, x: pipeline(stage_fn, params, x, table))
    wanted = loss(lambda params, x: looped(params, x, table))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(found[0][1][1], x[1])  # what goes along comes back with its microbatch
    assert found[0][1][2]["count"] == table.microbatches * table.stages * table.repeats


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_each_microbatch_visits_all_layers_in_order(table):
    """One stage after another, in steps without a gap, and no stage does two things at once."""
    visits = {}
    for step in range(table.steps):
        for stage in range(table.stages):
            microbatch, repeat, busy = table.at(step, stage)
            if busy:
                visits.setdefault(microbatch, []).append((step, repeat, stage))
    assert sorted(visits) == list(range(table.microbatches))
    for found in visits.values():
        assert [visit[1:] for visit in found] == [(r, s) for r in range(table.repeats) for s in range(table.stages)]
        assert [visit[0] - found[0][0] for visit in found] == list(range(table.repeats * table.stages))


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_stages_wait_as_theory_says(table):
    """(p - 1) / (m v + p - 1) of the time: Narayanan et al., 2021, section 2.2, where it is given as a share of the work."""
    busy = [sum(bool(table.at(step, stage)[2]) for step in range(table.steps)) for stage in range(table.stages)]
    assert set(busy) == {table.microbatches * table.repeats}
    assert 1 - busy[0] / table.steps == pytest.approx(table.bubble)
    p, m, v = table.stages, table.microbatches, table.repeats
    assert table.bubble / (1 - table.bubble) == pytest.approx((p - 1) / m / v)


def test_what_is_not_finite_on_zeros_stays_in_the_bubbles():
    """A stage that waits computes on zeros; even if that is no number, values and sums do not see it."""

    def stage(params, repeat, x):
        return x / jnp.abs(x).max() * params[repeat], (1 / x).sum()

    table = Timetable(4, 4)
    made, sums = jax.jit(lambda p, x: pipeline(stage, p, x, table))(jnp.full((4, 1), 2.0), jnp.full((4, 3), 5.0))
    np.testing.assert_allclose(made, 2.0)
    np.testing.assert_allclose(sums, 4 * 3 * (0.2 + 0.5 * 3))


def staged(stages, repeats=1, data=1):
    cfg = schema.Mesh(data=data, fsdp=1, stage=stages)
    return Layout(mesh.make_mesh(cfg, jax.devices()[: data * stages]), cfg.rules, repeats=repeats)


def test_number_of_microbatches():
    """As many for each stage as divide its rows, four at most."""
    layout = staged(4, data=2)
    assert [timetable(layout, 2 * rows).microbatches for rows in (4, 8, 12, 16, 20, 24, 32)] == [4, 8, 12, 16, 4, 12, 16]
    assert timetable(dataclasses.replace(layout, microbatches=8, repeats=3), 64) == Timetable(4, 8, 3)


@pytest.mark.parametrize(("stages", "repeats"), [(2, 2), (2, 3), (4, 2), (4, 3), (4, 6), (8, 2), (8, 4)])
def test_layers_are_dealt_to_the_stages_that_run_them(stages, repeats):
    """Stored in their order, half a model on each of two stages; run in rounds, each stage its part of every round."""
    layout, layers = staged(stages, repeats), 2 * stages * repeats
    param = jax.tree.map(lambda _: jnp.arange(layers * 3.0).reshape(layers, 3), sharding.param((3,), ("mlp",)))
    with sharding.use(layout):
        found = jax.jit(lambda p: by_stage(p, stages, repeats))(param).get_value()
    want = np.arange(layers * 3.0).reshape(repeats, stages, 2, 3).swapaxes(0, 1)
    np.testing.assert_array_equal(found, want)
    assert found.sharding.shard_shape(found.shape) == (1, *want.shape[1:])


def test_dry_run_shows_the_pipeline():
    config = schema.Config(
        model=schema.Model(num_layers=9, prefix=("layer",), vocab_size=264),
        mesh=schema.Mesh(fsdp=2, stage=4, pipeline_repeats=2),
        data=schema.Data(batch_size=16, length=32),
    )
    text = dry_run.report(config)
    for words in ("stages 4", "layers of a stage 2", "microbatches (mesh.pipeline_microbatches) 8", "steps 19", "stage waits 15.8%"):
        assert re.search(r"\s+".join(map(re.escape, words.split())), text), words
    assert re.search(r"body/layers/0/attention/q\s+\(8, 64, 64\)\s+layers embed heads\s+stage fsdp -", text)
