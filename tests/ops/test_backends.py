"""Backends of attention: what each is refused for, and that they compute what `causal_attention` does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.ops import split_attention
from maxtrain.ops.backends import BACKENDS, Backend, chosen
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.splash_attention import splash_attention
from maxtrain.parallel import context, mesh, sharding
from maxtrain.parallel.sharding import Layout


class Elsewhere:
    """As much of a mesh as a layout needs, of devices that are not here."""

    def __init__(self, platform, shape):
        self.devices = np.array([type("Device", (), {"platform": platform, "compute_capability": "9.0"})()])
        self.shape = {"context": 1, "tensor": 1, **shape}


def choice(platform, name="auto", model=None, compute="bfloat16", axes=None, length=256):
    config = schema.Config(
        model=schema.Model(**(model or {})),
        mesh=schema.Mesh(**(axes or {})),
        train=schema.Train(attention=name),
        precision=schema.Precision(compute=compute),
        data=schema.Data(length=length),
    )
    rules = {axis: axes for axis, axes in config.mesh.rules.items() if axis in ("length", "heads")}
    place = Layout(Elsewhere(platform, {axis: size for axis, size in (axes or {}).items() if isinstance(size, int)}), rules)
    return chosen(config, context.settled(config, place))


MLA = {"mla": schema.Mla()}


def test_auto_takes_the_best_that_can():
    assert choice("tpu") == "splash"
    assert choice("tpu", model=MLA | {"attention_softcap": 20.0, "slots": {"layer": schema.Slot(window=7)}}) == "splash"
    assert choice("tpu", model={"attention_sinks": True}) == "splash"
    assert choice("tpu", length=192) == "xla"
    assert choice("tpu", compute="float16") == "xla"
    assert choice("tpu", axes={"context": 4}) == "xla"
    assert choice("tpu", axes={"context": 4, "context_attention": "all_to_all"}) == "splash"
    assert choice("gpu") == choice("cpu", compute="float32") == "xla"
    assert choice("gpu", "cudnn") == "cudnn"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("cpu", "splash"), r"train\.attention=splash: it runs on tpu, and the devices are of the platform cpu; or take auto"),
        (("tpu", "cudnn"), r"train\.attention=cudnn: it runs on gpu"),
        (("gpu", "cudnn", None, "float32"), r"precision\.compute=float32, and it computes in bfloat16, float16"),
        (("tpu", "splash", None, "bfloat16", None, 192), r"data\.length=192 is not a multiple of 128"),
        (
            ("tpu", "splash", None, "bfloat16", {"context": 2}),
            r"ring attention computes its own blocks: set mesh\.context_attention to",
        ),
        (("gpu", "cudnn", MLA), r"keys of width \d+ and values of width \d+ \(model\.mla\)"),
        (("gpu", "cudnn", {"head_dim": 20}), r"head width 20 is not a multiple of 8, at most 256"),
        (("gpu", "cudnn", {"head_dim": 512}), r"head width 512 is not a multiple of 8, at most 256"),
        (("gpu", "cudnn", {"attention_softcap": 5.0}), r"model\.attention_softcap=5\.0, and it has no cap"),
        (("gpu", "cudnn", {"attention_sinks": True}), r"model\.attention_sinks=true, and it has none"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(asked, message):
    with pytest.raises(Refused, match=message):
        choice(*asked)


def compare(attention, length, width, value_width, kv_heads, options, sink):
    """Value and gradients against `causal_attention`, in float32."""
    rng = np.random.default_rng(0)
    shapes = ((4, width), (kv_heads, width), (kv_heads, value_width), (4, value_width))
    q, k, v, out = (jnp.asarray(rng.normal(size=(2, length, *shape)), jnp.float32) for shape in shapes)
    q = q * width**-0.5
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32) if sink else None
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, length))), jnp.int32)
    got, back = jax.vjp(lambda q, k, v, sinks: attention(q, k, v, segments, sinks, options), q, k, v, sinks)
    want, reference = jax.vjp(lambda q, k, v, sinks: causal_attention(q, k, v, segments, sinks, options), q, k, v, sinks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(back(out)), jax.tree.leaves(reference(out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "width", "value_width", "kv_heads", "options", "sink"),
    [
        (256, 128, 128, 2, Options(), False),
        (256, 96, 64, 1, Options(window=40, softcap=2.0), True),
        (640, 16, 16, 4, Options(window=130), False),
    ],
)
def test_splash_computes_the_same(length, width, value_width, kv_heads, options, sink):
    """The kernel's operations one by one on CPU."""

    def interpreted(*args):
        return splash_attention(*args, interpret=True)

    compare(interpreted, length, width, value_width, kv_heads, options, sink)


@pytest.mark.parametrize("axes", [{"context": 2}, {"data": 2, "tensor": 2, "context": 2}])
@pytest.mark.parametrize("way", ["gather", "all_to_all"])
def test_a_backend_runs_on_each_device_by_itself(axes, way, monkeypatch):
    """A kernel cannot be partitioned, so whatever the mesh splits, it sees arrays of one device."""
    seen = []

    def alone(q, k, v, segments, sinks, options):
        seen.append((q.shape[2], k.shape[2], bool(jax.typeof(q).sharding.mesh.manual_axes)))
        return causal_attention(q, k, v, segments, sinks, options)

    cfg = schema.Mesh(fsdp=1, **axes)
    made = mesh.make_mesh(cfg, jax.devices()[: 2 ** len(axes)])
    monkeypatch.setattr(split_attention, "BACKENDS", {"splash": Backend(alone)})

    def on_mesh(q, k, v, segments, sinks, options):
        with sharding.use(Layout(made, cfg.rules, way, False, "splash")):
            return jax.jit(lambda *x: split_attention.split_attention(*x[:4], None, x[4], options))(q, k, v, segments, sinks)

    compare(on_mesh, 64, 8, 6, 2, Options(window=20), True)
    shared = axes.get("tensor", 1) * (2 if way == "all_to_all" else 1)
    assert set(seen) == {(4 // shared, max(1, 2 // shared), True)}


def test_every_backend_can_be_named():
    named = schema.Train.model_fields["attention"].annotation.__args__
    assert set(named) == {"auto", *BACKENDS}
