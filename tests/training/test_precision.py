"""Number formats: float32 is multiplied as float32 on any device, and what bfloat16 computes stays near what float32 does."""

import re

import jax
import numpy as np
import pytest
from programs import BATCH, LENGTH, batches, build, losses, make_config, norms, run

from maxtrain.config import load, schema
from maxtrain.ops import grouped_matmul, linear
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.programs import Programs
from maxtrain.training.step import make_train_step

PRODUCT = re.compile(r"(?:dot_general|ragged_dot).*?precision\w* = \[([^\]]*)\].* : \(tensor<\w*?(f32|bf16)>")


def formats(lowered):
    """(format of the operands, precision) of all products of a lowered program."""
    found = [line for line in lowered.as_text().splitlines() if re.search(r"= \S*(dot_general|ragged_dot)\b", line)]
    pairs = {PRODUCT.search(line).groups() for line in found}
    return {(kind, "+".join(sorted(set(re.findall("HIGHEST|HIGH|DEFAULT", precision))))) for precision, kind in pairs}


FLOAT32 = {("f32", "HIGHEST")}


@pytest.mark.parametrize(
    ("compute", "others"), [("float32", set()), pytest.param("bfloat16", {("bf16", "DEFAULT")}, marks=pytest.mark.slow)]
)
def test_float32_is_multiplied_as_float32(compute, others):
    """In training and evaluation; the products that are in float32 where the rest is in bfloat16 are the router's."""
    program = build(make_config("dropless", precision=schema.Precision(compute=compute)))
    assert formats(program.lower_step()) == FLOAT32 | others
    assert formats(program.lower_eval(BATCH, LENGTH)) == FLOAT32 | others


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["deepseek-v3-tiny", "gpt-oss-tiny", "gemma2-tiny"])
@pytest.mark.parametrize(("compute", "others"), [("float32", set()), ("bfloat16", {("bf16", "DEFAULT")})])
def test_float32_is_multiplied_as_float32_on_cuda(preset, compute, others, monkeypatch):
    for module in (linear, grouped_matmul):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    program = build(load(f"configs/models/{preset}.yml", [f"precision.compute={compute}", "mesh.fsdp=1", "data.length=64"]).config)
    with sharding.use(program.layout), linear.products_in(compute):
        step = jax.jit(make_train_step(program.config, program.loss_fn)).trace(program.state, program.batch(8, 64), program.stop)
    kinds = FLOAT32 | others if "gemma" not in preset or compute == "float32" else others
    assert formats(step.lower(lowering_platforms=("cuda",))) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["deepseek-v3-tiny", "gpt-oss-tiny"])
def test_float32_is_multiplied_as_float32_in_serving(preset):
    config = load(f"configs/models/{preset}.yml", ["precision.compute=float32", "mesh.fsdp=1"]).config
    device_mesh = mesh.make_mesh(config.mesh, jax.devices()[:1])
    programs = Programs(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules), config.model.vocab_size)
    for lowered in programs.lower(programs.shapes[-1:]):
        assert formats(lowered) == FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "dropless", "capacity"])
def test_training_in_bfloat16_stays_near_float32(model):
    """Losses of ten steps within 0.2% and gradient norms within 5%; that they differ shows that bfloat16 was computed."""
    half, exact = (
        run(build(make_config(model, precision=schema.Precision(compute=compute)), 2), batches(10))[0]
        for compute in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(losses(half), losses(exact), rtol=2e-3)
    np.testing.assert_allclose(norms(half), norms(exact), rtol=5e-2)
    assert np.abs(losses(half) / losses(exact) - 1).max() > 1e-6
