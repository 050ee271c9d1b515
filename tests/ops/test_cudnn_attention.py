"""cuDNN's attention, which is lowered for CUDA here and neither compiled nor executed: there is no CUDA device."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import load
from maxtrain.ops import backends, grouped_matmul, linear
from maxtrain.ops import cudnn_attention as cudnn_attention_module
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.cudnn_attention import cudnn_attention, documents
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout
from maxtrain.training.program import make_program
from maxtrain.training.step import make_train_step

CALLS = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """As if cuDNN were there."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


def calls(text):
    """The cuDNN functions that a program calls."""
    return set(re.findall(r"@(__cudnn[\w$]*)\(", text))


def squares(text, length):
    """Shapes in a program with two dims of the length or more."""
    shapes = {tuple(map(int, dims.rstrip("x").split("x"))) for dims in re.findall(r"tensor<((?:\d+x)+)", text)}
    return {shape for shape in shapes if sum(dim >= length for dim in shape) > 1}


def test_documents_are_where_segments_change():
    lengths = [[5, 3, 8], [16], [1, 1, 1, 13]]
    segments = np.stack([np.repeat(np.arange(len(row)) + 7, row) for row in lengths]).astype(np.int32)
    starts, sizes, fit = documents(jnp.asarray(segments), 6)
    assert fit
    for row, want in enumerate(lengths):
        pad = [-1] * (6 - len(want))
        assert sizes[row].tolist() == want + pad
        assert starts[row].tolist() == np.cumsum([0, *want[:-1]]).tolist() + pad
    assert not documents(jnp.asarray(segments), 3)[2]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("most", [2, 9])
def test_the_call_says_what_attention_is_asked_for(window, most, monkeypatch):
    """What cuDNN is told of documents, computed by `causal_attention`: values and gradients are those of the segments."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    def stand_in(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length):
        assert (scale, mask_type, sliding_window_length) == (1.0, library.MaskType.CAUSAL, window)
        assert q_seqlen is kv_seqlen
        assert q_offsets is kv_offsets
        at, first = jnp.arange(q.shape[1])[:, None], q_offsets[:, None, :-1]
        inside = (first >= 0) & (at >= first) & (at < first + q_seqlen[:, None])
        return causal_attention(
            q, k, v, jnp.where(inside.any(-1), inside.argmax(-1) + 1, 0).astype(jnp.int32), None, Options(window=window)
        )

    monkeypatch.setattr(library, "dot_product_attention", stand_in)
    monkeypatch.setattr(cudnn_attention_module, "MOST", most)
    rng = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(rng.normal(size=(2, 40, heads, 16)), jnp.float32) for heads in (4, 2, 2, 4))
    segments = jnp.asarray(np.sort(rng.integers(1, 6, (2, 40))), jnp.int32)  # up to five documents
    got, back = jax.vjp(lambda *x: cudnn_attention(*x, segments, None, Options(window=window)), q, k, v)
    want, reference = jax.vjp(lambda *x: causal_attention(*x, segments, None, Options(window=window)), q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(back(out), reference(out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("window", [None, 64])
def test_documents_are_no_mask(window):
    length = 2048
    shapes = [((2, length, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((2, length), jnp.int32))]

    def f(q, k, v, segments):
        return cudnn_attention(q, k, v, segments, None, Options(window=window)).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert calls(text) >= CALLS
    assert squares(text, length) == set()
    assert ("sliding_window_length" in text) or window is None
    offsets = 33  # of at most 32 documents and their end
    assert f"tensor<2x{offsets}xi32>" in text or f"tensor<2x{offsets}x1x1xi32>" in text


@pytest.mark.slow
def test_the_train_step_has_no_mask(monkeypatch):
    """The step of a model with windows, in bfloat16, on packed documents."""
    for module in (linear, grouped_matmul):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    words = ["precision.compute=bfloat16", "model.layers=scan", "mesh.fsdp=1", "data.length=2048", "model.max_length=2048"]
    config = load("configs/models/mistral-tiny.yml", [*words, "data.batch_size=2", "model.head_dim=64"]).config
    device_mesh = mesh.make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))
    layout = replace(program.layout, attention="cudnn")
    with sharding.use(layout), linear.products_in("bfloat16"):
        step = jax.jit(make_train_step(program.config, program.loss_fn)).trace(program.state, program.batch(2, 2048), program.stop)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert calls(text) >= CALLS
    assert squares(text, 2048) == set()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.attention_softcap=5.0"], "softcap"),
        (["model.attention_sinks=true"], "sinks"),
        (["precision.compute=float32"], "precision.compute=float32"),
        (["model.head_dim=512"], "256"),
        (["data.length=65"], "data.length=65"),
    ],
)
def test_what_it_cannot_do_is_refused(words, reason, monkeypatch):
    base = ["precision.compute=bfloat16", "mesh.fsdp=1", "data.length=64", "model.head_dim=64"]
    given = {word.partition("=")[0]: word for word in (*base, *words)}
    config = load("configs/models/llama-tiny.yml", list(given.values())).config
    device_mesh = mesh.make_mesh(config.mesh, jax.devices()[:1])
    cfg = mesh.resolve(config, device_mesh)
    monkeypatch.setitem(backends.BACKENDS, "cudnn", replace(backends.BACKENDS["cudnn"], platforms=None, capability=None))
    assert reason in (backends.reason_against("cudnn", cfg, Layout(device_mesh, cfg.mesh.rules)) or "")


def test_a_card_that_is_too_old_is_refused(monkeypatch):
    class Card:
        compute_capability = "8.9"

    assert not backends._capable(Card(), (9, 0))
    Card.compute_capability = "10.0"
    assert backends._capable(Card(), (9, 0))
    assert not backends._capable(object(), (9, 0))
