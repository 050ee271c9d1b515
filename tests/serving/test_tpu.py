"""The long tier: the engine's programs compile ahead of time for a TPU topology with libtpu; nothing is executed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import json, math, sys
import jax
from jax.experimental import topologies
from maxtrain.config import load
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.programs import Programs

keys = ["serve.memory_gib=0.25", "serve.page_size=32", "serve.max_requests=16", "precision.params=bfloat16"]
config = load(sys.argv[1], [*keys, *sys.argv[2:]]).config
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
device_mesh = mesh.make_mesh(config.mesh, devices)
programs = Programs(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules), config.model.vocab_size)
with programs.compiling():
    pass
step = programs._steps[programs.shapes[-1]]
print(json.dumps({
    "programs": len(programs.shapes),
    "temporary": step.memory_analysis().temp_size_in_bytes, "kernel": step.as_text().count("ragged_paged_attention"),
    "aliased": step.memory_analysis().alias_size_in_bytes,
    "caches": sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(programs.spec.caches)),
}))
"""


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("llama-tiny", ["mesh.tensor=2", "model.embed=512", "model.mlp=1024"]),
        ("mixtral-tiny", ["mesh.expert=2", "model.embed=512", "model.moe.mlp=512"]),
    ],
)
def test_programs_compile_for_v5e(preset, overrides):
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", CODE, f"configs/models/{preset}.yml", *overrides]
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["programs"] >= 4
    assert found["aliased"] >= found["caches"]  # the pools are updated in place
    assert found["kernel"] > 0
    assert found["temporary"] < found["caches"] / 4  # no page is gathered
