"""The train step: the same numbers on any mesh and with any microbatches, and what is done about bad steps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import crossing
from programs import BATCH, EXPERTS, LENGTH, MODELS, batches, build, compiled, decided_batches, losses, make_config, norms, run

from maxtrain.checkpoint.orbax import Checkpointer
from maxtrain.config import schema
from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import is_param, kind
from maxtrain.training import dry_run
from maxtrain.training import state as states
from maxtrain.training.optimizer import make_schedule
from maxtrain.training.program import put_batch, put_stop
from maxtrain.training.step import make_train_step


def steady(model):
    """The batches that a kind of model is compared on."""
    return batches(20) if model == "dense" else decided_batches(model)


@functools.cache
def one_device(model):
    return run(build(make_config(model), 2), steady(model))[0]


def assert_same(rows, reference):
    np.testing.assert_allclose(losses(rows), losses(reference), rtol=1e-5)
    np.testing.assert_allclose(norms(rows), norms(reference), rtol=1e-4)


# (model, data, fsdp, microbatches): all combinations in the long tier
SHORT = [("dropless", 2, 2, 2)]
LONG = [(m, d, f, n) for m in MODELS for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for n in (1, 2, 4) if d * f * n <= BATCH and d * f * n > 1]


@pytest.mark.parametrize(("model", "data", "fsdp", "microbatches"), SHORT)
def test_mesh_and_microbatches_change_nothing(model, data, fsdp, microbatches):
    config = make_config(model, data=data, fsdp=fsdp, microbatches=microbatches)
    assert_same(run(build(config, 2), steady(model))[0], one_device(model))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data", "fsdp", "microbatches"), [case for case in LONG if case not in SHORT])
def test_mesh_and_microbatches_change_nothing_at_all(model, data, fsdp, microbatches):
    test_mesh_and_microbatches_change_nothing(model, data, fsdp, microbatches)


WINDOWED = schema.Model(
    vocab_size=264,
    embed=32,
    mlp=64,
    num_layers=3,
    layers="scan",
    layer_pattern=("local", "layer"),
    slots={"local": schema.Slot(window=9), "layer": schema.Slot()},
)
BIASED = schema.Model(
    vocab_size=264,
    embed=32,
    mlp=64,
    num_layers=2,
    layers="scan",
    qkv_bias=True,
    out_bias=True,
    attention_sinks=True,
    attention_softcap=5.0,
    final_softcap=3.0,
    slots={"layer": schema.Slot(feed_forward="moe")},
    moe=schema.Moe(**EXPERTS, expert_bias=True, router_bias=True, shared_mlp=16),
)  # what has a part of its own on each device: sinks, biases, caps
LATENT = schema.Model(
    vocab_size=264,
    embed=32,
    mlp=64,
    num_layers=2,
    layers="scan",
    qkv_bias=True,
    mtp=schema.Mtp(num_layers=1),
    mla=schema.Mla(q_rank=24, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=12),
    rope=schema.Rope(interleaved=True),
    slots={"local": schema.Slot(window=9)},
    layer_pattern=("local",),
)
BOXED = BIASED.model_copy(update={"moe": BIASED.moe.model_copy(update={"dispatch": "capacity"})})
AXES_SHORT = [
    ("dense", {"fsdp": 2, "axes": {"tensor": 2}}),
    (LATENT, {"data": 2, "axes": {"context": 2}}),  # a ring in the balanced order
]
RING = {"context": 4, "context_attention": "ring"}
AXES_LONG = [
    (LATENT, {"fsdp": 2, "axes": {"tensor": 2}}),
    ("dense", {"axes": {"tensor": 2}}),
    ("dense", {"axes": {"tensor": 4}}),  # two devices share a kv head
    ("dense", {"axes": {"context": 2}}),
    ("dense", {"axes": {"context": 4}}),
    ("dense", {"data": 2, "axes": {"tensor": 2, "context": 2}}),
    ("dense", {"fsdp": 2, "axes": {"context": 2}, "microbatches": 2}),
    (WINDOWED, {"axes": {"tensor": 2, "context": 2}}),
    (WINDOWED, {"data": 2, "fsdp": 2, "axes": {"tensor": 2}}),
    ("dropless", {"axes": {"tensor": 2}}),
    ("dropless", {"axes": {"context": 2}}),
    ("capacity", {"data": 2, "axes": {"tensor": 2}}),
    ("capacity", {"axes": {"context": 2}}),
    ("dropless", {"axes": {"expert": 2}}),
    ("capacity", {"data": 2, "axes": {"expert": 4}}),
    (BIASED, {"axes": {"tensor": 2, "expert": 2}}),
    (BIASED, {"axes": {"tensor": 4}}),
    (LATENT, {"data": 2, "axes": {"tensor": 2, "context": 2}}),
    (BOXED, {"axes": {"tensor": 2, "expert": 2}}),
    ("dense", {"data": 4, "fsdp": 2, "axes": {"zero1": True}}),
    (LATENT, {"data": 2, "microbatches": 2, "axes": {"tensor": 2, "zero1": True}}),
    # sequences that several devices share, in every way; without a word of it, in a balanced ring
    ("dense", {"axes": {"context": 8}}),
    ("dense", {"axes": RING | {"context_order": "natural"}}),
    ("dense", {"fsdp": 2, "axes": RING | {"context_order": "balanced"}, "microbatches": 2}),
    ("dense", {"axes": {"context": 4, "context_attention": "all_to_all"}}),  # two devices share a kv head
    ("dense", {"fsdp": 2, "axes": {"tensor": 2, "context": 2, "context_attention": "all_to_all"}}),
    ("dense", {"axes": {"context": 4, "context_attention": "gather"}}),
    (WINDOWED, {"fsdp": 2, "axes": RING}),
    (WINDOWED, {"axes": RING | {"context_order": "natural"}}),
    (WINDOWED, {"data": 2, "axes": {"context": 4, "context_attention": "all_to_all"}}),
    (LATENT, {"axes": RING}),
    (LATENT, {"fsdp": 2, "axes": RING | {"context_order": "natural"}}),
    (LATENT, {"axes": {"context": 4, "context_attention": "all_to_all"}}),
    (BIASED, {"axes": {"context": 2, "expert": 2}}),
    (BIASED, {"axes": {"context": 4, "context_attention": "all_to_all"}}),
    (BIASED, {"axes": {"tensor": 2, "context": 2, "context_attention": "all_to_all", "expert": 2}}),
    (BOXED, {"axes": {"context": 4}}),  # capacity: natural order
    ("dropless", {"axes": RING | {"expert": 2}}),
    ("capacity", {"axes": {"context": 2, "expert": 2, "context_attention": "all_to_all"}}),
]


@pytest.mark.parametrize(("model", "layout"), [*AXES_SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in AXES_LONG)])
def test_other_axes_change_nothing(model, layout):
    """Ten steps; the batches hold two documents a row."""
    given = batches(10) if model in ("dense", WINDOWED, LATENT) else decided_batches(model, 10)
    reference = one_device(model)[:10] if isinstance(model, str) and model == "dense" else run(build(make_config(model), 2), given)[0]
    assert_same(run(build(make_config(model, **layout), 2), given)[0], reference)


def test_zero1_splits_the_moments_alone():
    """Over all eight devices, the parameters over the two of fsdp; norms have no axis to split."""
    whole, split = (build(make_config(data=4, fsdp=2, axes={"zero1": on})) for on in (False, True))
    matrices = [leaf for leaf in jax.tree.leaves(split.state.model) if leaf.size > 64]  # the rest are norms
    assert dry_run.bytes_per_device(matrices) == sum(leaf.size * 4 // 2 for leaf in matrices)
    moments = [leaf for leaf in jax.tree.leaves(split.state.opt_state) if leaf.size > 64]
    assert dry_run.bytes_per_device(moments) == sum(leaf.size * 4 // 8 for leaf in moments)
    assert dry_run.bytes_per_device(whole.state.opt_state) > 3 * dry_run.bytes_per_device(split.state.opt_state)


@pytest.mark.slow
def test_evaluation_of_shared_sequences_changes_nothing():
    found = []
    for axes in ({}, {"context": 4}):
        program = build(make_config(LATENT, axes=axes))
        step, spec = program.lower_eval(BATCH, LENGTH).compile(), program.batch(BATCH, LENGTH)
        found.append(jax.device_get(step(program.create(0).model, put_batch(batches(1)[0], spec, list(range(BATCH))))))
    np.testing.assert_allclose(found[1]["loss"], found[0]["loss"], rtol=1e-5)
    assert found[1]["tokens"] == found[0]["tokens"]


def deeper(model, num_layers, **keys):
    return (MODELS[model] if isinstance(model, str) else model).model_copy(update={"num_layers": num_layers} | keys)


ROUNDS = {"stage": 2, "pipeline_repeats": 2}
PREFIXED = deeper(WINDOWED, 6, prefix=("local",))  # the body is two periods of two, with a layer before and one behind
STAGES_SHORT = [(deeper("dense", 4), {"fsdp": 2, "axes": ROUNDS})]
STAGES_LONG = [
    ("dropless", {"axes": {"stage": 2, "expert": 2}}),
    ("dense", {"axes": {"stage": 2}}),
    ("dense", {"axes": {"stage": 2, "pipeline_microbatches": 2}}),
    ("dense", {"data": 2, "axes": {"stage": 2, "tensor": 2}}),
    ("dense", {"data": 2, "axes": {"stage": 2, "context": 2}}),
    ("dense", {"fsdp": 2, "axes": {"stage": 2}, "microbatches": 2}),
    ("dense", {"data": 2, "axes": {"stage": 2, "rules": schema.Mesh().rules | {"batch": ("data",)}}}),
    (deeper("dense", 4), {"axes": {"stage": 4}}),
    (deeper("dense", 4), {"fsdp": 2, "axes": {"stage": 4, "pipeline_microbatches": 4}}),
    (deeper("dense", 4), {"axes": ROUNDS}),
    (deeper("dense", 8), {"fsdp": 2, "axes": {"stage": 4, "pipeline_repeats": 2}}),
    (deeper("dense", 4), {"fsdp": 2, "axes": ROUNDS | {"tensor": 2}, "microbatches": 2}),
    (deeper("dense", 4), {"axes": ROUNDS, "remat": schema.Remat(policy="full")}),
    (deeper("dropless", 4), {"axes": ROUNDS, "remat": schema.Remat(policy="dots")}),
    (PREFIXED, {"data": 2, "axes": {"stage": 2}}),
    (PREFIXED, {"axes": {"stage": 2, "tensor": 2}}),
    (LATENT, {"axes": {"stage": 2}}),
    (LATENT, {"fsdp": 2, "axes": {"stage": 2, "tensor": 2}}),
    (deeper("dropless", 4), {"data": 2, "axes": ROUNDS | {"expert": 2}}),
    ("dropless", {"axes": {"stage": 2}, "microbatches": 2}),
    ("capacity", {"data": 2, "axes": {"stage": 2, "expert": 2}}),
    (BIASED, {"axes": {"stage": 2, "tensor": 2, "expert": 2}}),
]


@pytest.mark.parametrize(("model", "layout"), [*STAGES_SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in STAGES_LONG)])
def test_stages_change_nothing(model, layout):
    """GPipe and several rounds; documents are packed, and routers' balancing terms are those of one device."""
    model = MODELS[model] if isinstance(model, str) else model
    given = batches(10) if model.moe is None else decided_batches(model, 10)
    found, reference = (run(build(make_config(model, **keys), 2), given)[0] for keys in (layout, {}))
    assert_same(found, reference)
    for name in {"balance", "router_z", "mtp_loss"} & set(reference[0]):
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in reference], rtol=1e-5)


@pytest.mark.slow
def test_scan_gives_the_unrolled_losses_and_checkpoint(tmp_path):
    slots = {"local": schema.Slot(window=9), "moe": schema.Slot(feed_forward="moe")}
    model = schema.Model(
        embed=32, mlp=64, num_layers=6, slots=slots, prefix=("local",), layer_pattern=("local", "moe"), moe=MODELS["capacity"].moe
    )
    rows, saved, programs = {}, {}, {}
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        for step, layers in enumerate(("scan", "unroll")):
            programs[layers] = build(make_config(model.model_copy(update={"layers": layers})))
            rows[layers], state = run(programs[layers], decided_batches(model, 6))
            saved[layers] = states.stack(state)
            checkpoints.save(step, saved[layers], {})
        assert_same(rows["scan"], rows["unroll"])
        for step, (layers, other) in enumerate((("scan", "unroll"), ("unroll", "scan"))):
            like = programs[other].state
            restored = states.unstack(checkpoints.restore(step, states.stack(like)), like)
            assert jax.tree.structure(restored) == jax.tree.structure(like)
            assert_identical(states.stack(restored), saved[layers])  # by names and bits


@pytest.mark.parametrize("axes", [{"stage": 2}, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_stages_go_on_from_one_device_and_back_bit_for_bit(tmp_path, axes):
    """A checkpoint knows nothing of stages: what two of them saved, one device reads, and the other way round."""
    model = deeper("dense", 4)
    programs = [build(make_config(model, axes=axes), 2), build(make_config(model), 2)]
    with Checkpointer(str(tmp_path), schema.Checkpoint()) as checkpoints:
        state = run(programs[0], batches(10)[:2])[1]
        for step, (program, other) in enumerate((programs, programs[::-1])):
            saved = states.stack(state)
            checkpoints.save(step, saved, {})
            restored = states.unstack(checkpoints.restore(step, states.stack(other.state)), other.state)
            assert_identical(states.stack(restored), saved)
            rows = [run(found, batches(10)[2:4], jax.tree.map(jnp.copy, given)) for found, given in ((program, state), (other, restored))]
            assert_same(*(row for row, _ in rows))
            state = rows[1][1]


def assert_identical(found, wanted):
    """The same names, formats and bits."""
    (found, _), (wanted, _) = map(jax.tree_util.tree_flatten_with_path, (found, wanted))
    assert [(path, leaf.dtype) for path, leaf in found] == [(path, leaf.dtype) for path, leaf in wanted]
    for (_, a), (_, b) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_initial_values_do_not_depend_on_the_mesh():
    first, second = (build(make_config(data=d, fsdp=f)) for d, f in ((1, 1), (2, 4)))
    for a, b in zip(*(jax.tree.leaves(p.create(3).model) for p in (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_name_changes_nothing():
    renamed = make_config(run=schema.Run(name="deepseek3-llama3.1"))
    np.testing.assert_array_equal(losses(run(build(renamed, 2), batches(20)[:5])[0]), losses(one_device("dense"))[:5])


def test_sources_add_up():
    for row in one_device("dense"):
        np.testing.assert_allclose(row["loss_by_source"].sum(), row["loss"], rtol=1e-6)
        assert row["tokens_by_source"].sum() == row["tokens"]


def test_positions_without_weight_have_no_influence():
    given = batches(20)[0]
    changed = given | {"targets": np.where(given["weights"] == 0, 7, given["targets"])}
    program = build(make_config(), 2)
    (a, b), (first, second) = zip(*(((rows[0]), state.model) for rows, state in (run(program, [x]) for x in (given, changed))), strict=True)
    assert a["loss"] == b["loss"]
    assert_identical(first, second)


@pytest.mark.parametrize("model", ["dropless", "capacity"])
def test_padding_has_no_influence(model):
    """Not in attention, not in an expert's capacity, not in the balancing loss."""
    given = batches(20)[0]
    padding = np.arange(LENGTH) >= LENGTH - 15
    blank = {"segments": np.where(padding, 0, given["segments"]), "weights": np.where(padding, 0, given["weights"])}
    gradient = jax.jit(jax.value_and_grad(build(make_config(model)).loss_fn, has_aux=True))
    state = build(make_config(model)).create(0)
    found = [gradient(state.model, given | blank | {"tokens": np.where(padding, t, given["tokens"])}) for t in (3, given["tokens"][::-1])]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [{}, {"tensor": 2}, RING, {"context": 4, "context_attention": "all_to_all"}])
def test_masks_are_not_kept_for_all_layers(axes):
    """Nothing that only says which token sees which is computed outside the layers: it would grow by the square of the length."""
    program = build(make_config(axes=axes, data=1, fsdp=2))
    with sharding.use(program.layout):
        traced = jax.make_jaxpr(make_train_step(program.config, program.loss_fn))(program.state, program.batch(BATCH, LENGTH), program.stop)
    masks = [var.aval.shape for equation in traced.eqns for var in equation.outvars if var.aval.dtype == bool]
    assert max(map(math.prod, masks)) <= BATCH * LENGTH


def test_every_device_can_ask_to_stop_and_changes_nothing_by_it():
    program = build(make_config(data=2, fsdp=4), 2)
    step, batch = compiled(program), put_batch(batches(1)[0], program.batch(BATCH, LENGTH), list(range(BATCH)))
    found = {}
    for device in (None, 0, 5):
        asked = np.arange(8) == device
        stop = jax.make_array_from_callback((8,), program.stop.sharding, lambda index, asked=asked: asked[index].astype(np.int32))
        found[device] = jax.device_get(step(program.create(0), batch, stop))
    assert [metrics.pop("stop") for _, metrics in found.values()] == [0, 1, 1]
    assert_identical(found[None], found[5])


def test_a_state_that_is_not_finite_is_told():
    program = build(make_config(data=2, fsdp=4), 2)
    step, batch = compiled(program), put_batch(batches(1)[0], program.batch(BATCH, LENGTH), list(range(BATCH)))
    for name, bad in (("nothing", 0.0), ("moment", np.inf), ("moment", np.nan)):
        state = program.create(0)
        moments = [leaf.at[(0,) * leaf.ndim].add(bad) if leaf.ndim else leaf for leaf in jax.tree.leaves(state.opt_state)]
        moments = jax.device_put(moments, [leaf.sharding for leaf in jax.tree.leaves(state.opt_state)])
        state = state.replace(opt_state=jax.tree.unflatten(jax.tree.structure(state.opt_state), moments))
        _, metrics = step(state, batch, put_stop(False, program.stop))
        assert bool(metrics["finite"]) == (name == "nothing")


def test_custom_loss():
    def loss_fn(model, batch):
        total = sum((leaf**2).sum() for leaf in jax.tree.leaves(model))
        return total, {"tokens": batch["weights"].sum(), "loss": total}

    rows, _ = run(build(make_config(), loss_fn=loss_fn), batches(20)[:5])
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
    assert sum(decays) == 7  # the stacked q, k, v, out, gate, up, down: no norm, no embedding
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
    rows, state = run(program, batches(20)[:6], state)
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


FACTORS = (1.0, float("nan"), float("inf"), 50.0)


@functools.cache
def poisonable(**keys):
    """A program whose loss is multiplied by the factor that the batch's `source` numbers."""
    config = make_config(guard=schema.Guard(window=8, **keys))
    plain = build(config).loss_fn

    def loss_fn(model, batch):
        total, sums = plain(model, batch)
        factor = jnp.array(FACTORS)[batch["source"][0]]
        return total * factor, sums | {"loss": sums["loss"] * factor}

    return build(config, loss_fn=loss_fn)


def marked(batch, factor):
    return batch | {"source": np.full(BATCH, FACTORS.index(factor), np.int32)}


@pytest.mark.parametrize(("factor", "counted"), [(FACTORS[1], 4), (FACTORS[2], 10), (50.0, 9)])
def test_bad_steps_leave_the_state_alone(factor, counted):
    """A finite spike is only known once the window of recent steps is full."""
    program, given = poisonable(), batches(20)
    early, state = run(program, given[:counted])
    assert not any(row["skipped"] for row in early)
    before = jax.device_get((state.model, state.opt_state))
    bad = marked(given[counted], factor)
    (row, again), after = run(program, [bad, bad], state)
    assert row["skipped"]
    assert (row["skipped_in_a_row"], again["skipped_in_a_row"]) == (1, 2)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves((after.model, after.opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.data_step), int(after.guard.counted)) == (counted + 2, counted + 2, counted)
    (row,), _ = run(program, [given[counted]], after)
    assert not row["skipped"]
    assert row["skipped_in_a_row"] == 0


def test_a_spike_before_the_window_is_full_counts():
    rows, _ = run(poisonable(), [*batches(20)[:5], marked(batches(20)[5], 50.0)])
    assert not rows[-1]["skipped"]


def test_spikes_pass_when_switched_off():
    rows, _ = run(poisonable(spike_sigmas=None), [*batches(20)[:9], marked(batches(20)[9], 50.0)])
    assert not rows[-1]["skipped"]
    assert rows[-1]["grad_norm"] > 10 * rows[-2]["grad_norm"]


# --------------------------------------------------------------------------------------------------------- compile


def test_scan_compiles_one_period_whatever_the_depth():
    sizes = []
    for depth in (4, 16, 64):
        model = MODELS["dense"].model_copy(update={"layers": "scan", "num_layers": depth})
        sizes.append(len(build(make_config(model)).lower_step().as_text().splitlines()))
    assert max(sizes) - min(sizes) < 0.01 * min(sizes)


@pytest.mark.parametrize("axes", [{"stage": 2}, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_between_stages_activations_go_to_neighbours_and_weights_stay(axes):
    """Over `stage` there are permutations, and sums over the batch of what is outside of the body; nothing is gathered."""
    config = make_config(deeper("dense", 4, mlp=72), fsdp=2, axes={"tensor": 2} | axes)  # no activation is 72 wide
    found = crossing(compiled(build(config)).as_text(), 8, 2)
    kinds = {kind for kind, _ in found}
    assert "collective-permute" in kinds
    assert kinds <= {"collective-permute", "all-reduce"}, found
    rounds = axes.get("pipeline_repeats", 1)
    of_body = [(kind, shape) for kind, shapes in found for shape in shapes if shape[-1] in (36, 72) or shape[-2:-1] in ((36,), (72,))]
    assert all(kind == "collective-permute" for kind, _ in of_body), of_body
    assert bool(of_body) == (rounds > 1)  # a stage of several rounds is dealt its layers
    moved = [shape for kind, shapes in found if kind == "collective-permute" for shape in shapes]
    assert (1, 1, LENGTH // 2, 32) in moved  # one row of one microbatch, its tokens shared by the devices of `tensor`
