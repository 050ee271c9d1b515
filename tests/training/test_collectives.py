"""Reading collectives from compiled text: against programs whose traffic is known, and the forms that only TPUs have."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxtrain.training import collectives
from maxtrain.training.collectives import Collective

N = 64  # float32 elements on a device
BYTES = 4.0 * N


def mesh_of(**sizes):
    shape = tuple(sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def ring(x):
    return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])


PROGRAMS = {  # what runs on each device, and the collective it is: kind, axes, bytes of the whole array, bytes sent, devices
    "psum": (lambda x: jax.lax.psum(x, "a"), ("all-reduce", ("a",), BYTES, BYTES, 2)),
    "psum of both": (lambda x: jax.lax.psum(x, ("a", "b")), ("all-reduce", ("a", "b"), BYTES, 2 * 7 / 8 * BYTES, 8)),
    "gather": (lambda x: jax.lax.all_gather(x, "b").sum(0), ("all-gather", ("b",), 4 * BYTES, 3 * BYTES, 4)),
    "scatter": (lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), 4), ("reduce-scatter", ("b",), BYTES, 3 / 4 * BYTES, 4)),
    "exchange": (lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True), ("all-to-all", ("b",), BYTES, 3 / 4 * BYTES, 4)),
    "ring": (ring, ("collective-permute", ("b",), BYTES, BYTES, 4)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic_of_a_loop(name):
    """Five turns of a loop in four of another, and once after them."""
    body, (kind, axes, size, sent, group) = PROGRAMS[name]
    mesh = mesh_of(a=2, b=4)

    def one(x, _):
        return body(x) * 0.5, None

    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (jax.lax.scan(one, x, None, length=5)[0], None), x, None, length=4)
        return one(jnp.sin(x), None)[0]

    whole = jax.ShapeDtypeStruct((8 * N,), jnp.float32)
    mapped = jax.shard_map(program, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    found = collectives.read(jax.jit(mapped).lower(whole).compile().as_text(), mesh)
    assert {(item.kind, item.axes, item.network) for item in found} == {(kind, axes, "ICI")}
    for item in found:
        assert item.size == pytest.approx(size)
        assert item.sent == pytest.approx(sent)
        assert item.group in (group, 2) if kind == "collective-permute" else item.group == group
    assert sum(item.runs for item in found) == 21
    assert collectives.total(found) == {(kind, axes, "ICI"): (21, pytest.approx(21 * sent))}


TPU = """
HloModule m
%cond (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(16)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
%all-reduce-scatter.3 (input.3: bf16[8,512]) -> bf16[4,512] {
  %r = bf16[8,512]{1,0:T(8,128)(2,1)} all-reduce(%input.3), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}
%first (x: bf16[2,512]) -> bf16[8,512] {
  %g.1 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, frontend_attributes={chain_id="1"}
}
%second (x: bf16[2,512]) -> bf16[8,512] {
  %g.2 = bf16[8,512]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, frontend_attributes={chain_id="1"}
}
%body (p: (s32[])) -> (s32[]) {
  %f.1 = bf16[4,512]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %f.2 = bf16[8,512]{1,0} fusion(%p), kind=kCustom, calls=%first
  %f.3 = bf16[8,512]{1,0} fusion(%p), kind=kCustom, calls=%second
}
ENTRY %main (p: (s32[])) -> (s32[]) {
  %w = (s32[]{:T(128)}) while(%p), condition=%cond, body=%body
  %s = (bf16[2,64]{1,0}, bf16[2,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %t = f32[16]{0} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %rows = bf16[4,64]{1,0} copy(%x)
  %v = bf16[8,64]{1,0} ragged-all-to-all(%rows, %room, %i, %j, %k, %l), channel_id=9, replica_groups={{0,1},{2,3}}
  %u = (bf16[1,64]{1,0}, bf16[2,64]{1,0}) all-gather-start(%z), replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""  # noqa: E501


def test_forms_of_tpus():
    """A scatter by fusion, a gather repeated in two fusions of a chain, groups by axis name and by order, starts with counters, room."""
    assert collectives.read(TPU, mesh_of(a=2, b=2)) == [
        Collective("collective-permute", ("a",), "ICI", 256, 256, 1, 2),
        Collective("all-reduce", ("a",), "ICI", 64, 64, 1, 2),
        Collective("ragged-all-to-all", ("b",), "ICI", 512, 256, 1, 2),
        Collective("all-gather", ("b",), "ICI", 256, 128, 1, 2),
        Collective("reduce-scatter", ("b",), "ICI", 8192, 4096, 16, 2),
        Collective("all-gather", ("a", "b"), "ICI", 8192, 6144, 16, 4),
    ]


def test_axes_of_the_torus():
    """A group over both mesh axes lies along both axes of the torus."""
    grid = np.empty((2, 2), object)
    for place in np.ndindex(2, 2):
        grid[place] = SimpleNamespace(coords=(*place, 0))
    mesh = SimpleNamespace(devices=grid, axis_names=("a", "b"), size=4)
    assert [item.rings for item in collectives.read(TPU, mesh)] == [1, 1, 1, 1, 1, 2]


UNROLLED = """
%cond (p: (f32[64], s32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (f32[64], u32[]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
%body (p: (f32[64], s32[])) -> (f32[64], s32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (f32[64], u32[]) parameter(0)
  %x = f32[64]{0} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %y = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (f32[64], u32[]) tuple(%y, /*index=1*/%next)
}
ENTRY %main (p: (f32[64], s32[])) -> (f32[64], s32[]) {
  %p = (f32[64], u32[]) parameter(0)
  ROOT %w = (f32[64], u32[]) while(%p), condition=%cond, body=%body
}
"""


def test_loop_that_counts_by_two():
    assert [item.runs for item in collectives.read(UNROLLED, mesh_of(a=2, b=2))] == [4]


SLICES = """
ENTRY %main (p: (s32[])) -> (s32[]) {
  %s = (bf16[2,64]{1,0}, u32[], token[]) send(%x, %t), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %d = token[] send-done(%s), channel_id=6, is_host_transfer=true
}
"""  # noqa: E501


def test_what_hosts_carry_between_slices():
    devices = np.array([SimpleNamespace(slice_index=number // 2) for number in range(4)]).reshape(2, 2)
    mesh = SimpleNamespace(devices=devices, axis_names=("a", "b"), size=4)
    assert collectives.read(SLICES, mesh) == [Collective("all-reduce", ("a",), "DCN", 256, 256, 1, 2)]
