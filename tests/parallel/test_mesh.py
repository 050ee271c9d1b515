"""From the devices that are there to a mesh, and what is refused on the way."""

import jax
import pytest

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.parallel import mesh


@pytest.mark.parametrize(
    ("data", "fsdp", "devices", "want"),
    [(1, -1, 8, (1, 8)), (-1, 1, 8, (8, 1)), (-1, 2, 8, (4, 2)), (2, 4, 8, (2, 4)), (1, -1, 1, (1, 1)), (1, 1, 1, (1, 1))],
)
def test_sizes(data, fsdp, devices, want):
    cfg = schema.Mesh(data=data, fsdp=fsdp)
    assert mesh.sizes(cfg, devices) == want
    made = mesh.make_mesh(cfg, jax.devices()[:devices])
    assert dict(made.shape) == dict(zip(("data", "fsdp"), want, strict=True))
    assert set(made.devices.flat) == set(jax.devices()[:devices])


@pytest.mark.parametrize(("data", "fsdp", "devices"), [(3, -1, 8), (2, 2, 8), (16, 1, 8), (1, 1, 8), (-1, 16, 8)])
def test_sizes_that_do_not_fit_are_refused(data, fsdp, devices):
    with pytest.raises(Refused, match=rf"mesh\.data={data}, mesh\.fsdp={fsdp} does not fit {devices} devices"):
        mesh.sizes(schema.Mesh(data=data, fsdp=fsdp), devices)


def config(**sections):
    return schema.Config(mesh=schema.Mesh(data=2, fsdp=4), **sections)


def test_auto_is_settled_for_the_platform():
    resolved = mesh.resolve(config(), mesh.make_mesh(config().mesh))
    assert (resolved.model.layers, resolved.precision.compute) == ("unroll", "float32")
    chosen = config(model=schema.Model(layers="scan"), precision=schema.Precision(compute="bfloat16"))
    assert mesh.resolve(chosen, mesh.make_mesh(chosen.mesh)) == chosen


HELD = {"held": schema.Source(kind="synthetic")}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": schema.Data(batch_size=12)}, r"data\.batch_size=12 .* 8 devices .* multiple of 8"),
        ({"data": schema.Data(batch_size=8), "train": schema.Train(microbatches=2)}, r"4 sequences at a time, .* multiple of 16"),
        (
            {"eval": schema.Eval(sets={"a": schema.Source(kind="synthetic")}, batch_size=4)},
            r"eval\.batch_size=4 is not a multiple of the 8",
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused(sections, message):
    with pytest.raises(Refused, match=message):
        mesh.resolve(config(**sections), mesh.make_mesh(config().mesh))


def test_rows_may_stay_whole():
    """With a rule that splits the batch over `data` only, two devices share it."""
    rules = {"batch": ("data",), "embed": ("fsdp",)}
    cfg = schema.Config(mesh=schema.Mesh(data=2, fsdp=4, rules=rules), data=schema.Data(batch_size=2))
    assert mesh.resolve(cfg, mesh.make_mesh(cfg.mesh)).data.batch_size == 2
