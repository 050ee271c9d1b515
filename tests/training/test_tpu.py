"""The long tier: the train step compiles ahead of time for a TPU topology with libtpu; nothing is executed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import json, re, sys
from collectives import crossing
from jax.experimental import topologies
from maxtrain.config import load
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout, parameter_table
from maxtrain.training.program import make_program

given = dict(word.split("=", 1) for word in ("data.batch_size=8", "data.length=128", "model.embed=512", *sys.argv[2:]))
config = load(sys.argv[1], [f"{key}={value}" for key, value in given.items()]).config
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
device_mesh = mesh.make_mesh(config.mesh, devices)
program = make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))
compiled = program.lower_step().compile()
text = compiled.as_text()
print(json.dumps({
    "compute": program.config.precision.compute, "layers": program.config.model.layers, "devices": len(devices),
    "arguments": compiled.memory_analysis().argument_size_in_bytes,
    "parameters": sum(p.size for p in parameter_table(program.state.model).values()),
    "gathers": text.count("all-gather"), "barriers": text.count("opt-barrier"),
    "ragged": text.count("ragged-all-to-all"), "exchanges": text.count("all-to-all"), "rings": text.count("collective-permute-start"),
    "attention": program.layout.attention, "exchange": program.layout.exchange,
    "kernels": sorted(set(re.findall("splash_mha_([a-z]+)_", text))),
    "gathered": sum(bool(re.search(r"\\[\\d+,\\d+,\\d+.* all-gather(-start)?\\(", line)) for line in text.splitlines()),
    "products": sorted({(re.match(r"\\w+", line.split(" = ")[1])[0], (re.findall("operand_precision={([a-z,]+)}", line) or [""])[0])
                        for line in text.splitlines() if re.search(r" (convolution|dot)\\(", line)}),
    "crossing": sorted({kind for kind, shapes in crossing(text, len(devices), config.mesh.stage)}),
}))
"""


def compile_for_v5e(preset, *overrides):
    """What CODE prints, in a process of its own."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", CODE, f"configs/models/{preset}.yml", *overrides]
    env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/training'}"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("llama-tiny", ["mesh.tensor=2", "model.mlp=1024"]),
        ("llama-tiny", ["mesh.context=2", "model.mlp=1024"]),
        ("mixtral-tiny", ["mesh.expert=2", "model.moe.mlp=512"]),
        ("mixtral-tiny", ["mesh.expert=2", "model.moe.mlp=512", "model.moe.dispatch=capacity"]),
    ],
)
def test_other_axes_compile_for_v5e(preset, overrides):
    """Among them the ragged exchange of tokens, which no other platform runs."""
    found = compile_for_v5e(preset, *overrides)
    ragged = "mesh.expert=2" in overrides and "model.moe.dispatch=capacity" not in overrides
    assert (found["ragged"] > 0) == ragged


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("llama-tiny", []),
        ("llama-tiny", ["mesh.fsdp=1", "mesh.tensor=4"]),  # two devices share a kv head
        ("llama-tiny", ["mesh.context=2", "mesh.context_attention=all_to_all", "data.length=512"]),
        ("llama-tiny", ["mesh.context=4", "mesh.context_attention=gather"]),  # nothing that attention reads is split
        ("gemma2-tiny", ["remat.policy=full"]),  # windows and softcap
        ("gpt-oss-tiny", []),  # sinks
        ("deepseek-v3-tiny", []),  # keys wider than values
    ],
)
def test_splash_compiles_for_v5e(preset, overrides):
    """The kernel runs in the forward pass, and twice in the backward pass for the gradients of queries and of keys and values."""
    found = compile_for_v5e(preset, "model.mlp=1024", *overrides)
    assert (found["attention"], found["exchange"]) == ("splash", "all_to_all" if "mesh.context=2" in overrides else "gather")
    assert found["kernels"] == ["dkv", "dq", "fwd"]
    assert found["exchanges"] > 0 or "mesh.context=2" not in overrides


@pytest.mark.parametrize("order", ["balanced", "natural"])
def test_ring_compiles_for_v5e(order):
    found = compile_for_v5e("llama-tiny", "model.mlp=1024", "mesh.context=4", f"mesh.context_order={order}", "data.length=1024")
    assert (found["attention"], found["exchange"], found["kernels"]) == ("xla", "ring", [])
    assert found["rings"] > 0
    assert found["gathered"] == 0  # arrays [batch, length] of a batch are put in order, nothing larger is gathered


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_float32_on_v5e(compute):
    """By default a TPU multiplies float32 in one pass of bfloat16. Where the rest is bfloat16, the router alone is multiplied so."""
    found = compile_for_v5e("mixtral-tiny", "model.moe.mlp=512", f"precision.compute={compute}", "train.attention=xla")
    exact = ["f32", "highest,highest"]
    assert exact in found["products"]
    assert found["products"] == [exact] or compute == "bfloat16"


STAGE = ["mesh.stage=2", "model.num_layers=4"]


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("llama-tiny", ["model.mlp=1024"]),
        ("llama-tiny", ["model.mlp=1024", "mesh.tensor=2", "remat.policy=dots"]),
        ("llama-tiny", ["model.mlp=1024", "mesh.pipeline_repeats=2", "remat.policy=full"]),
        ("mixtral-tiny", ["model.moe.mlp=512", "mesh.expert=2"]),
    ],
)
def test_stages_compile_for_v5e(preset, overrides):
    """Activations go from stage to stage, nothing is gathered over them; a ragged exchange of tokens takes place in each."""
    found = compile_for_v5e(preset, *STAGE, *overrides)
    assert found["crossing"] == ["all-reduce", "collective-permute"]
    assert (found["ragged"] > 0) == ("mesh.expert=2" in overrides)


@pytest.mark.parametrize(("preset", "wider"), [("llama-tiny", "model.mlp=1024"), ("mixtral-tiny", "model.moe.mlp=512")])
def test_step_compiles_for_v5e(preset, wider):
    """The miniatures are widened to whole TPU tiles, so that bytes can be compared with the count of parameters."""
    found = compile_for_v5e(preset, wider)
    assert (found["compute"], found["layers"], found["devices"]) == ("bfloat16", "scan", 4)
    # parameters and two moments in float32, split over 4 devices; the rest is the batch and the small replicated norms
    assert found["arguments"] == pytest.approx(12 * found["parameters"] / 4, rel=0.15)
    assert found["gathers"] > 0
