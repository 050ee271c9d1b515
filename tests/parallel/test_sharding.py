"""The rules from logical axes to the mesh, the parameter table that everything is derived from, and rows on devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.decoder import Decoder
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout, check_placement, initialise, kind, param, parameter_table, per_shard, shardings
from maxtrain.training import dry_run
from maxtrain.training.program import local_rows, make_program, put_batch

RULES = schema.Mesh().rules


def layout(data=2, fsdp=4, rules=RULES):
    cfg = schema.Mesh(data=data, fsdp=fsdp)
    return Layout(mesh.make_mesh(cfg, jax.devices()[: data * fsdp]), rules)


def tiny(**keys):
    cfg = schema.Model(embed=32, mlp=64, num_layers=3, **keys)
    return Decoder(cfg.model_copy(update={"layers": "scan"}), schema.Precision(compute="float32"), schema.Remat())


# ----------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("axes", "want"),
    [
        (("batch", "length"), PartitionSpec(("data", "fsdp"), None)),
        (("embed", "mlp"), PartitionSpec("fsdp", None)),
        (("layers", "mlp", "embed"), PartitionSpec(None, None, "fsdp")),
        ((None, "embed"), PartitionSpec(None, "fsdp")),
        ((), PartitionSpec()),
    ],
)
def test_axes_follow_the_rules(axes, want):
    assert layout().spec(axes) == want


def test_one_mesh_axis_for_two_axes_of_an_array_is_refused():
    with pytest.raises(Refused, match="over the same mesh axis"):
        layout(rules={"embed": ("fsdp",), "mlp": ("fsdp",)}).spec(("embed", "mlp"))


def test_sizes_that_devices_cannot_share_are_refused():
    with pytest.raises(Refused, match=r"mesh\.rules\.vocab: embedding has 259 along vocab, which 4 devices of fsdp"):
        shardings(tiny(vocab_size=259), layout(rules={"vocab": ("fsdp",)}))


def test_every_array_of_a_state_is_laid_out_by_its_axes():
    """Moments follow their parameters; a stack of layers is split along the same axis as one layer."""
    config = schema.Config(model=schema.Model(embed=32, mlp=64, layers="scan"), mesh=schema.Mesh(data=2, fsdp=4))
    place = layout()
    state = make_program(mesh.resolve(config, place.mesh), place).state
    for tree in (state.model, state.opt_state.mu, state.opt_state.nu):
        leaves = [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        specs = {name: leaf.sharding.spec for name, leaf in leaves}
        assert specs["embedding"] == PartitionSpec(None, "fsdp")
        assert specs["body/layers/0/attention/q"] == PartitionSpec(None, "fsdp", None)
        assert specs["body/layers/0/feed_forward/down"] == PartitionSpec(None, None, "fsdp")
        assert specs["norm/scale"] == PartitionSpec(None)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.step, state.data_step, state.guard)))


# ----------------------------------------------------------------------------------------------------------- table


def test_table_names_every_parameter():
    moe = {"slots": {"layer": schema.Slot(feed_forward="moe")}, "moe": schema.Moe(num_experts=4, experts_per_token=2, mlp=24)}
    table = parameter_table(tiny(tie_embeddings=False, **moe))
    assert table["body/layers/0/feed_forward/gate"].axes == ("layers", "expert", "embed", "mlp")
    assert table["body/layers/0/feed_forward/gate"].shape == (3, 4, 32, 24)
    assert {name: kind(row.axes) for name, row in table.items() if kind(row.axes) != "matrix"} == {
        "embedding": "embedding",
        "head": "embedding",
        "norm/scale": "norm",
        "body/layers/0/attention_norm/scale": "norm",
        "body/layers/0/feed_forward_norm/scale": "norm",
    }


def test_initial_values_have_the_spread_that_was_asked_for():
    made = initialise({"w": param((500, 400), ("embed", "mlp"), std=0.3), "norm": param((5,), ("norm",))}, 0)
    value = made["w"].get_value()
    assert float(value.std()) == pytest.approx(0.3, rel=0.01)
    assert float(jnp.abs(value).max()) < 2.3 * 0.3
    np.testing.assert_array_equal(made["norm"].get_value(), np.ones(5))


def test_initial_values_are_all_different():
    """No parameter, layer or seed repeats the numbers of another."""
    values = [np.asarray(leaf) for seed in (0, 1) for leaf in jax.tree.leaves(initialise(tiny(), seed)) if leaf.ndim == 3]
    drawn = [tuple(layer.flat[:8]) for value in values for layer in value / value.std()]
    assert len(set(drawn)) == len(drawn) == 2 * 7 * 3


def test_a_parameter_that_lies_elsewhere_than_described_is_an_accident():
    place = layout()
    model = {"w": param((8, 16), ("embed", "mlp"), std=1.0)}
    described = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), model, shardings(model, place))
    made = initialise(described, 0)
    check_placement(made, described)
    with pytest.raises(AssertionError, match=r"w \(8, 16\) lies as"):
        check_placement(jax.device_put(made, place.sharding()), described)


# ------------------------------------------------------------------------------------------------------ activations


def test_per_shard_computes_the_same_on_local_rows():
    seen = []

    def center(x, y, weight):  # not row-wise on purpose: it shows which rows are together
        seen.append(x.shape)
        return (x + y) @ weight - x.mean()

    x, y, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, 6), (8, 6), (6, 3)]))
    axes = (("batch", None), ("batch", None), (None, None)), ("batch", None)
    plain = per_shard(center, *axes)(x, y, weight)
    with sharding.use(layout()):
        local = jax.jit(per_shard(center, *axes))(x, y, weight)
    assert seen == [(8, 6), (1, 6)]
    want = (x + y) @ weight - x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(local, want, rtol=1e-5, atol=1e-6)
    assert np.abs(plain - want).max() > 0.1


def test_per_shard_adds_up_the_gradient_of_weights():
    x, weight = jax.random.normal(jax.random.key(0), (8, 6)), jax.random.normal(jax.random.key(1), (6, 3))

    def loss(weight):
        return jnp.square(per_shard(lambda x, w: x @ w, (("batch", None), (None, None)), ("batch", None))(x, weight)).sum()

    plain = jax.grad(loss)(weight)
    with sharding.use(layout()):
        split = jax.jit(jax.grad(loss))(weight)
    np.testing.assert_allclose(split, plain, rtol=1e-5)


def test_constrain_pins_a_layout_only_in_use():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ("batch", None)) is x
    with sharding.use(layout(1, 1)):
        assert sharding.constrain(x, ("batch", None)) is x
    with sharding.use(layout()):
        pinned = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(x)
    assert pinned.sharding.spec == PartitionSpec(("data", "fsdp"))


# ------------------------------------------------------------------------------------------------- rows and memory


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (4, 2)])
def test_batches_arrive_row_by_row(data, fsdp):
    config = schema.Config(model=schema.Model(embed=32), data=schema.Data(batch_size=16, length=12))
    place = layout(data, fsdp)
    spec = make_program(mesh.resolve(config, place.mesh), place).batch(16, 12)
    rows = local_rows(spec["tokens"])
    assert rows == list(range(16))
    host = {name: np.arange(math.prod(s.shape)).reshape(s.shape).astype(s.dtype) for name, s in spec.items()}
    arrays = put_batch(host, spec, rows)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, host[name])
        assert array.sharding == spec[name].sharding
        assert array.addressable_shards[0].data.shape[0] == 16 // (data * fsdp)


def test_dry_run_counts_the_bytes_that_the_compiler_allocates():
    model = schema.Model(embed=64, mlp=128, vocab_size=512)
    config = schema.Config(model=model, mesh=schema.Mesh(data=2, fsdp=4), data=schema.Data(batch_size=8, length=32))
    place = layout()
    program = make_program(mesh.resolve(config, place.mesh), place)
    counted = sum(map(dry_run.bytes_per_device, (program.state.model, program.state.opt_state, program.batch(8, 32))))
    found = program.lower_step().compile().memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx(counted, rel=0.1)
    assert found.alias_size_in_bytes == pytest.approx(found.argument_size_in_bytes, rel=0.1)  # the new state takes the old one's place
    text = dry_run.report(config)
    for tree in (program.state.model, program.state.opt_state):
        assert f"{dry_run.bytes_per_device(tree):,}" in text
