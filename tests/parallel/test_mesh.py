"""From the devices that are there to a mesh, and what is refused on the way."""

import subprocess
import sys

import jax
import pytest

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.parallel import context, mesh
from maxtrain.parallel.sharding import Layout


def test_processes_that_no_cluster_names_are_refused(monkeypatch):
    def initialize(*args, **kwargs):  # as jax has it where it finds no cluster; devices have been asked for here, which it would refuse
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Refused, match=r"mesh\.num_processes=auto: no cluster says who the processes are"):
        mesh.start(schema.Run(compile_cache=None), schema.Mesh(num_processes="auto"))


@pytest.mark.parametrize(
    ("asked", "devices", "want"),
    [
        ({"fsdp": -1}, 8, {"fsdp": 8}),
        ({"data": -1, "fsdp": 1}, 8, {"data": 8}),
        ({"data": -1, "fsdp": 2}, 8, {"data": 4, "fsdp": 2}),
        ({"data": 2, "fsdp": 4}, 8, {"data": 2, "fsdp": 4}),
        ({}, 1, {}),
        ({"data": 1, "fsdp": 1}, 1, {}),
        ({"tensor": 4}, 8, {"fsdp": 2, "tensor": 4}),
        ({"fsdp": 1, "stage": 2, "expert": 2, "context": -1}, 8, {"stage": 2, "expert": 2, "context": 2}),
        ({"fsdp": -1, "dcn": {"data": 2}}, 8, {"data": 2, "fsdp": 4}),
        ({"fsdp": 2, "tensor": -1, "dcn": {"fsdp": 2}}, 8, {"fsdp": 4, "tensor": 2}),
    ],
)
def test_sizes(asked, devices, want):
    cfg = schema.Mesh(**asked)
    assert mesh.sizes(cfg, devices) == tuple(want.get(axis, 1) for axis in mesh.AXES)
    made = mesh.make_mesh(cfg, jax.devices()[:devices])
    assert {axis: size for axis, size in made.shape.items() if size > 1} == want
    assert set(made.devices.flat) == set(jax.devices()[:devices])


@pytest.mark.parametrize(("data", "fsdp", "devices"), [(3, -1, 8), (2, 2, 8), (16, 1, 8), (1, 1, 8), (-1, 16, 8)])
def test_sizes_that_do_not_fit_are_refused(data, fsdp, devices):
    with pytest.raises(Refused, match=rf"mesh\.data={data}, mesh\.fsdp={fsdp} does not fit {devices} devices"):
        mesh.sizes(schema.Mesh(data=data, fsdp=fsdp), devices)


def test_slices_are_the_outer_part_of_an_axis():
    """Two slices of four devices: what is not named in dcn stays within a slice."""
    grid = mesh.make_mesh(schema.Mesh(fsdp=2, tensor=2, dcn={"fsdp": 2})).devices.squeeze()
    slices = [[device.id // 4 for device in row] for row in grid]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


class Sliced:
    """A device of one of two slices, as a TPU describes itself."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4


def test_slices_and_dcn_must_agree():
    with pytest.raises(Refused, match=r"2 slices, mesh\.dcn=\{\} multiplies to 1"):
        mesh.make_mesh(schema.Mesh(), [Sliced(number) for number in range(8)])


def config(**sections):
    return schema.Config(**({"mesh": schema.Mesh(data=2, fsdp=4)} | sections))


def test_auto_is_settled_for_the_platform():
    resolved = mesh.resolve(config(), mesh.make_mesh(config().mesh))
    assert (resolved.model.layers, resolved.precision.compute) == ("unroll", "float32")
    chosen = config(model=schema.Model(layers="scan"), precision=schema.Precision(compute="bfloat16"))
    assert mesh.resolve(chosen, mesh.make_mesh(chosen.mesh)) == chosen


BOXED = schema.Model(
    slots={"layer": schema.Slot(feed_forward="moe")}, moe=schema.Moe(num_experts=4, experts_per_token=2, mlp=8, dispatch="capacity")
)


@pytest.mark.parametrize(
    ("sections", "want"),
    [
        ({"mesh": schema.Mesh(fsdp=2, context=4)}, ("ring", True)),
        ({"mesh": schema.Mesh(fsdp=2, context=4, context_order="natural")}, ("ring", False)),
        ({"mesh": schema.Mesh(fsdp=2, context=4), "data": schema.Data(length=36)}, ("ring", False)),
        ({"mesh": schema.Mesh(fsdp=2, context=4), "model": BOXED}, ("ring", False)),
        ({"mesh": schema.Mesh(fsdp=2, context=4, context_attention="all_to_all")}, ("all_to_all", False)),
        ({}, ("gather", False)),
    ],
)
def test_devices_that_share_sequences_form_a_ring(sections, want):
    cfg = config(**sections)
    made = mesh.make_mesh(cfg.mesh)
    found = context.settled(mesh.resolve(cfg, made), Layout(made, cfg.mesh.rules))
    assert (found.exchange, found.balanced) == want


HELD = {"held": schema.Source(kind="synthetic")}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": schema.Mesh(fsdp=1, tensor=8)}, r"num_heads=4 .* cannot be shared by the 8 devices of tensor"),
        ({"mesh": schema.Mesh(fsdp=1, context=8), "data": schema.Data(length=36)}, r"data\.length=36 is not a multiple of the 8 .*context"),
        (
            {"mesh": schema.Mesh(fsdp=1, tensor=2, context=4), "data": schema.Data(length=36)},
            r"data\.length=36 is not a multiple of the 8 .*context\+tensor",
        ),
        ({"mesh": schema.Mesh(fsdp=8, zero1=True)}, r"mesh\.zero1 has no effect: there are no replicas"),
        (
            {"mesh": schema.Mesh(fsdp=1, context=8, context_attention="all_to_all")},
            r"mesh\.context_attention=all_to_all: model\.num_heads=4 and model\.num_kv_heads=2 cannot be shared by the 8 devices of "
            r"context: .*or take ring",
        ),
        (
            {"mesh": schema.Mesh(fsdp=1, tensor=2, context=4, context_attention="all_to_all")},
            r"cannot be shared by the 8 devices of tensor\+context",
        ),
        (
            {"mesh": schema.Mesh(fsdp=1, context=8, context_order="balanced"), "data": schema.Data(length=40)},
            r"mesh\.context_order=balanced: data\.length=40 is not a multiple of 16, two chunks for each of 8 devices: choose another",
        ),
        (
            {"mesh": schema.Mesh(fsdp=1, context=8, context_order="balanced"), "model": BOXED},
            r"mesh\.context_order=balanced: model\.moe\.dispatch=capacity drops tokens by their order: choose dropless, or take natural",
        ),
        ({"data": schema.Data(batch_size=12)}, r"data\.batch_size=12 .* 8 devices .* multiple of 8"),
        ({"data": schema.Data(batch_size=8), "train": schema.Train(microbatches=2)}, r"4 sequences at a time, .* multiple of 16"),
        (
            {"eval": schema.Eval(sets={"a": schema.Source(kind="synthetic")}, batch_size=4)},
            r"eval\.batch_size=4 is not a multiple of the 8",
        ),
    ],
)
def test_what_does_not_divide_is_refused(sections, message):
    cfg = config(**sections)
    with pytest.raises(Refused, match=message):
        mesh.resolve(cfg, mesh.make_mesh(cfg.mesh))


STAGED = {"mesh": schema.Mesh(fsdp=4, stage=2), "model": schema.Model(num_layers=6)}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": schema.Model(num_layers=4, layers="unroll")}, r"model\.layers=unroll: the 2 stages .* set it to scan or auto"),
        ({"model": schema.Model(num_layers=3)}, r"num_layers=3: behind a prefix of 0 there are 3 periods of 1 layers, which 2 stages"),
        ({"mesh": schema.Mesh(fsdp=4, stage=2, pipeline_repeats=2)}, r"there are 6 .*repeats=2 .* until the periods are a multiple of 4"),
        ({"mesh": schema.Mesh(fsdp=4, stage=2, pipeline_microbatches=3)}, r"pipeline_microbatches=3 is not a multiple of the 2 stages"),
        (
            {"mesh": schema.Mesh(fsdp=4, stage=2, pipeline_microbatches=4)},
            r"data\.batch_size: 8 sequences .* 4 microbatches .* multiple of 16",
        ),
        (
            {"mesh": schema.Mesh(fsdp=8, pipeline_microbatches=4)},
            r"mesh\.pipeline_microbatches=4 has no effect .* raise mesh\.stage or remove it",
        ),
        ({"mesh": schema.Mesh(fsdp=8, pipeline_repeats=2)}, r"mesh\.pipeline_repeats=2 has no effect"),
        ({"data": schema.Data(batch_size=12)}, r"data\.batch_size=12 .* 8 devices .* multiple of 8"),
        ({"eval": schema.Eval(prompts=("x",))}, r"eval\.prompts.* does not generate: .*maxtrain\.decode"),
        (
            {"mesh": schema.Mesh(fsdp=4, stage=2, rules={"batch": ("fsdp",), "layers": ("stage",)}), "data": schema.Data(batch_size=12)},
            r"data\.batch_size: 12 sequences .* multiple of 8",
        ),
    ],
)
def test_what_stages_cannot_share_is_refused(sections, message):
    cfg = config(**(STAGED | {"data": schema.Data(batch_size=8)} | sections))
    with pytest.raises(Refused, match=message):
        mesh.resolve(cfg, mesh.make_mesh(cfg.mesh))


def test_stages_take_stacked_layers():
    cfg = config(**STAGED)
    assert mesh.resolve(cfg, mesh.make_mesh(cfg.mesh)).model.layers == "scan"


def test_rows_may_stay_whole():
    """With a rule that splits the batch over `data` only, two devices share it."""
    rules = {"batch": ("data",), "embed": ("fsdp",)}
    cfg = schema.Config(mesh=schema.Mesh(data=2, fsdp=4, rules=rules), data=schema.Data(batch_size=2))
    assert mesh.resolve(cfg, mesh.make_mesh(cfg.mesh)).data.batch_size == 2


KEEPING = """
import ctypes, resource
from maxtrain.parallel import mesh
mesh.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
SIZE = 2**31 + 2**27
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    for at in range(0, SIZE, 4096):
        ctypes.c_char.from_address(block + at).value = b"x"
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.slow
def test_freed_memory_is_kept_even_above_2_gib():
    """A block of the size of a real step's temporaries costs page faults once."""
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000
