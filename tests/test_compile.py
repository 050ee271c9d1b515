"""The entry `compile`: what it refuses, and in the long tier reports for slices of TPUs; nothing is executed."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from maxtrain.compile import main
from maxtrain.config import Refused, schema
from maxtrain.parallel.mesh import make_mesh
from maxtrain.training.topology import devices_of

ROOT = pathlib.Path(__file__).parents[1]
TINY = "configs/models/llama-tiny.yml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "topology is missing"),
        (["topology=v5e"], "topology=v5e: a generation and its chips are expected"),
        (["topology=v9:2x2"], "generations: v5e, v6e, v5p, tpu7x"),
        (["topology=v5e:3x3"], "v5e has no such slice: there are 1x1, 2x2"),
        (["topology=v5p:4x4x6"], "v5p has no such slice: .* multiples of 4x4x4 up to 24"),
        (["topology=v5e:2x2", "slices=two"], "slices=two: a number is expected"),
        (["topology=v5e:2x2", "slices=0"], "slices=0: at least one slice"),
        (["topology=v5e:2x2", "decode=yes"], "decode=yes: true or false"),
        (["topology=v5e:2x2", "mesh.tensr=2"], "tensor"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(Refused, match=message):
        main([TINY, *words])


def run(*words, code=0):
    """What the entry prints, in a process of its own."""
    pytest.importorskip("libtpu")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "maxtrain.compile", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def figure(text, name, column=1):
    """The number in a row of a table."""
    (row,) = re.findall(rf"^ +{re.escape(name)}  +(.*)$", text, re.M)
    return float(row.split()[column - 1].replace(",", "").rstrip("%"))


WIDE = ["data.batch_size=16", "data.length=1024", "model.embed=512", "model.mlp=1024", "model.num_layers=4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:4x4", "v5p:4x4x4", "tpu7x:2x2x1"])
def test_slices_have_their_devices(name):
    pytest.importorskip("libtpu")
    chips = math.prod(map(int, name.partition(":")[2].split("x")))
    assert len(devices_of(name)) == chips * (2 if name.startswith("tpu7x") else 1)
    assert len({device.slice_index for device in devices_of(name, 2)}) == 2


@pytest.mark.slow
def test_axis_that_is_no_side_of_the_torus_divides_one():
    """8 experts' devices in a cube of 4: a block of 4 x 2, neighbours all."""
    pytest.importorskip("libtpu")
    grid = make_mesh(schema.Mesh(fsdp=-1, expert=8), devices_of("v5p:4x4x4")).devices.reshape(8, 8)
    for group in grid:
        assert sorted(len(set(along)) for along in zip(*(device.coords for device in group), strict=True)) == [1, 2, 4]


@pytest.mark.slow
def test_report_of_a_step_on_two_slices():
    """Gradients go between the slices, weights do not."""
    text = run(TINY, "topology=v5e:2x2", "slices=2", "mesh.dcn.data=2", *WIDE)
    networks = {
        (row.split()[1], row.split()[2]) for row in text.splitlines() if re.search(r"^  (all|reduce|coll)\S+ +\S+ +(ICI|DCN) ", row)
    }
    assert {axes for axes, network in networks if network == "DCN"} == {"data"}
    assert figure(text, "tokens/s at most") > 0


@pytest.mark.slow
def test_report_of_decoding():
    text = run(TINY, "topology=v5e:2x2", "decode=true", "mesh.tensor=2", "model.embed=512", "serve.memory_gib=0.04")
    assert figure(text, "cache") == pytest.approx(0.04, abs=0.01)
    assert "all-reduce" in text


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice():
    """And the advice, taken, fits."""
    big = ["configs/models/llama3.2-3b.yml", "topology=v5e:2x4", "data.batch_size=64", "data.length=2048", "model.num_layers=8"]
    text = run(*big, code=1)
    assert "does not fit" in text
    advice = re.search(r"By estimate these would fit:\n  (.*?)  \(", text)[1].split()
    assert "compiled in" in run(*big, *advice)


CODE = """
import dataclasses, json, sys
from maxtrain.config import load
from maxtrain.training import compilation, estimate
from maxtrain.training.topology import devices_of

made = compilation.program(load(sys.argv[1], sys.argv[3:]).config, devices_of(sys.argv[2]))
done = compilation.compiled(made.lower_step(), made.layout.mesh)
work = estimate.Work.of(made.config)
memory = estimate.memory(work, made.layout)  # what the dry run prints
print(json.dumps({
    "traffic": [item._asdict() for item in done.traffic],
    "theory": [item._asdict() for item in estimate.traffic(work, made.layout, {})],
    "arguments": done.arguments,
    "given": sum(memory[kind] for kind in ("parameters", "optimizer", "batch")),
    "compiled": done.total,
    "estimated": sum(memory.values()),
    "gradients": 4 * sum(leaf.elements(dataclasses.replace(made.layout, rules={})) for leaf in work.parameters),
}))
"""


def compiled(preset, topology, *words):
    pytest.importorskip("libtpu")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", CODE, f"configs/models/{preset}.yml", topology, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def sent(items, kind, axis):
    """Bytes that a device sends in a step, in collectives of a kind along an axis."""
    return sum(item["sent"] * item["runs"] for item in items if item["kind"] == kind and axis in item["axes"])


BIG = ["data.length=512", "model.embed=1024", "model.mlp=2048", "model.num_layers=4", "model.vocab_size=2048"]
FEW, MANY = [*BIG, "data.batch_size=64"], [*BIG, "data.batch_size=1024"]  # many where vector memory would hold what there is of few
CASES = {  # preset, topology, words
    "fsdp": ("llama-tiny", "v5e:2x4", FEW),
    "fsdp, solid": ("llama-tiny", "v5p:4x4x4", MANY),
    "remat": ("llama-tiny", "v6e:4x4", [*MANY, "remat.policy=full"]),
    "tensor": ("llama-tiny", "v5e:2x4", [*FEW, "mesh.tensor=4", "remat.policy=dots"]),
    "latent": ("deepseek-v2-tiny", "v5e:2x4", [*FEW, "model.moe.mlp=512", "model.moe.shared_mlp=512"]),
    "expert": ("mixtral-tiny", "v5e:2x4", [*FEW, "model.moe.mlp=1024", "mesh.expert=4"]),
    "context": ("llama3.2-1b", "v5e:4x4", ["data.length=8192", "data.batch_size=8", "remat.policy=full", "mesh.context=4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_traffic_and_memory_are_what_the_layout_calls_for(name):
    """Weights are gathered or go around, never added up whole; nothing large is replicated.

    The arguments are counted within a tenth, the total is estimated within a quarter. Gradients may be added up whole and then cut:
    twice the traffic of scattering them, which libtpu prefers over several axes of a torus.
    """
    preset, topology, words = CASES[name]
    found = compiled(preset, topology, *words)
    traffic, theory = found["traffic"], found["theory"]
    assert found["given"] == pytest.approx(found["arguments"], rel=0.1)
    assert found["estimated"] == pytest.approx(found["compiled"], rel=0.25)
    moved = sent(traffic, "all-gather", "fsdp") + sent(traffic, "collective-permute", "fsdp")
    assert moved > 0.6 * sent(theory, "all-gather", "fsdp")
    assert sent(traffic, "all-reduce", "fsdp") < 2.2 * found["gradients"]
    if name == "tensor":
        assert sent(traffic, "reduce-scatter", "tensor") > 4 * sent(traffic, "all-reduce", "tensor")
    if name == "expert":
        assert any("all-to-all" in item["kind"] and "expert" in item["axes"] for item in traffic)


@pytest.mark.slow
def test_plans_for_two_slices_are_compiled():
    """And the lines to paste compile for the same slices."""
    words = [TINY, "topology=v5e:2x2", "slices=2", *WIDE]
    text = run(*words, "--plan")
    lines = text.split("To run the first:")[1].split()
    assert "mesh.dcn.data=2" in lines
    assert "compiled in" in run(*words, *lines)
