"""Memory, traffic and time by arithmetic: against the described state, sums by hand, and in the long tier the compiler."""

import itertools
import math
import pathlib
from types import SimpleNamespace

import jax
import pytest
from programs import BATCH, LENGTH, build, make_config

from maxtrain.config import Refused, load, schema
from maxtrain.parallel import mesh as meshes
from maxtrain.parallel.sharding import Layout
from maxtrain.training import compilation, dry_run, estimate, planner
from maxtrain.training.collectives import Collective
from maxtrain.training.estimate import Time, Work
from maxtrain.training.hardware import CHIPS, Chip

ROOT = pathlib.Path(__file__).parents[2]
CHIP = CHIPS["TPU v5e"]
LAYOUTS = [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "axes": {"tensor": 4}}, {"data": 4, "fsdp": 2, "axes": {"zero1": True}}]


def layout_of(config, devices=8):
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:devices])
    return Layout(mesh, config.mesh.rules)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_state_is_counted_to_the_byte(sizes):
    program = build(make_config("dropless" if "axes" not in sizes else "dense", **sizes))
    found = estimate.memory(Work.of(program.config), program.layout)
    assert found["parameters"] == dry_run.bytes_per_device(program.state.model)
    assert found["optimizer"] == dry_run.bytes_per_device(program.state.opt_state)
    assert found["batch"] == pytest.approx(dry_run.bytes_per_device(program.batch(BATCH, LENGTH)), rel=0.01)


def test_a_kind_that_no_layer_has_is_not_counted():
    """One layer of a model whose layers are of two kinds in turn."""
    config = load("configs/models/gemma3-tiny.yml", ["model.num_layers=1", "data.length=64"]).config
    assert "parameters" in dry_run.report(config)


def test_what_is_computed_again_costs():
    config = meshes.settle(make_config(), on_cpu=True)
    times, kept = {}, {}
    for policy in ("none", "dots", "full"):
        chosen = config.model_copy(update={"remat": schema.Remat(policy=policy)})
        times[policy] = Work.of(chosen).hardware_flops
        kept[policy] = estimate.memory(Work.of(chosen), layout_of(make_config(fsdp=8)))["kept activations"]
    assert Work.of(config).model_flops < times["none"] < times["dots"] < times["full"] < 4 / 3 * 1.1 * times["none"]
    assert kept["none"] > kept["dots"] > kept["full"] > 0


def test_gradients_have_the_format_of_their_parameters():
    layout, found = layout_of(make_config(fsdp=8)), {}
    for params in ("float32", "bfloat16"):
        config = meshes.settle(make_config(fsdp=8, precision=schema.Precision(compute="bfloat16", params=params)), on_cpu=True)
        found[params] = estimate.memory(Work.of(config), layout)
    assert found["float32"]["gradients"] == 2 * found["bfloat16"]["gradients"] == found["float32"]["parameters"]


def test_each_attention_takes_its_own_memory():
    """Scores of blocks for plain XLA; for cuDNN a number for each token, head and document that has room, in a layer at work."""
    layout, found = layout_of(make_config(fsdp=8)), {}
    for name in ("xla", "splash", "cudnn"):
        config = make_config(fsdp=8, train=schema.Train(attention=name), remat=schema.Remat(policy="full"))
        work = Work.of(meshes.settle(config, on_cpu=True))
        found[name] = estimate.memory(work, layout)["a period at work"]
    assert found["xla"] > found["splash"]
    assert found["cudnn"] - found["splash"] == 4 * 32 * BATCH * LENGTH / 8 * work.config.model.num_heads


def test_the_gradient_of_a_shared_table_waits_for_its_other_part():
    """The head's, in float32, through the backward pass until the embedding's is added to it; a head of its own is done with at once."""
    sizes = {"vocab_size": 512, "embed": 32, "mlp": 4096, "layers": "scan"}  # the backward pass of a layer takes more than the loss
    found = {}
    for tied in (True, False):
        config = make_config(schema.Model(**sizes, tie_embeddings=tied), fsdp=8)
        found[tied] = estimate.memory(Work.of(meshes.settle(config, on_cpu=True)), layout_of(config))
    assert found[True]["head's gradient"] == 4 * 512 * 32
    assert "a period at work" in found[False]
    assert "head's gradient" not in found[False]


def test_traffic_of_fsdp_and_replicas():
    """A step gathers the layers twice and a table once, scatters gradients once, and adds them up between replicas in float32."""
    config = make_config(data=2, fsdp=4)
    work, layout = Work.of(meshes.settle(config, on_cpu=True)), layout_of(config)
    traffic = estimate.traffic(work, layout, {})
    found = {(item.kind, item.axes): item for item in traffic}
    parameters = sum(p.elements(layout) for p in work.parameters)
    split = 4 * sum(p.elements(layout) for p in work.parameters if "embed" in p.axes)
    whole = parameters - split // 4 + split
    tables = 264 * 32 * (2 - config.model.tie_embeddings)
    sent = {kind: sum(item.sent * item.runs for item in traffic if item.kind == kind) for kind in ("all-gather", "reduce-scatter")}
    uses = 1 + config.model.tie_embeddings
    assert sent == {"all-gather": 3 * (2 * (whole - tables) + uses * tables), "reduce-scatter": 3 * (whole - tables + uses * tables)}
    assert found["all-reduce", ("data",)].sent == 4 * parameters
    across = {(item.kind, item.network): item for item in estimate.traffic(work, layout, {"data": 2})}
    assert across["all-reduce", "DCN"].group == 2
    assert ("all-reduce", "ICI") not in across


def test_weights_are_gathered_in_the_compute_format_and_gradients_scattered_in_float32():
    def sent(compute):
        config = meshes.settle(make_config(fsdp=8, precision=schema.Precision(compute=compute)), on_cpu=True)
        traffic = estimate.traffic(Work.of(config), layout_of(make_config(fsdp=8)), {})
        return {kind: sum(item.sent * item.runs for item in traffic if item.kind == kind) for kind in ("all-gather", "reduce-scatter")}

    half, whole = sent("bfloat16"), sent("float32")
    assert 2 * half["all-gather"] == whole["all-gather"]
    assert half["reduce-scatter"] == whole["reduce-scatter"] > 0


def test_step_waits_for_what_is_exposed():
    chip, sent = Chip(100, 16, 1000, ici=100, dcn=10), 1e9
    layout, work = layout_of(make_config(fsdp=8)), Work.of(meshes.settle(make_config(), on_cpu=True))
    beside = Collective("all-gather", ("fsdp",), "ICI", sent, sent, 2, 8)
    between = Collective("all-reduce", ("tensor",), "ICI", sent, sent, 3, 8)
    far = Collective("all-reduce", ("data",), "DCN", sent, sent, 1, 2)
    found = estimate.time(work, layout, chip, [beside, between, far])
    assert found.hidden == {"ICI": pytest.approx(0.02), "DCN": pytest.approx(0.1)}
    assert found.exposed == pytest.approx(0.03)
    assert (found.step, found.bound) == (pytest.approx(0.13), "DCN")
    assert Time(2.0, 1.0).step == 2.0
    around = Collective("all-to-all", ("expert",), "ICI", sent, sent, 1, 16)
    assert estimate.network_seconds(around, chip) == pytest.approx(0.04)  # a quarter of the ring on the way
    assert estimate.network_seconds(around._replace(rings=2), chip) == pytest.approx(0.01)  # 4 x 4 devices
    assert estimate.network_seconds(beside._replace(rings=3), chip) == pytest.approx(0.02 / 3)


def test_neighbours_take_up_axes_of_the_torus():
    config = make_config(fsdp=4, axes={"tensor": 2})
    work, layout = Work.of(meshes.settle(config, on_cpu=True)), layout_of(config)
    for torus, rings in (((), (1, 1)), ((4, 2, 1), (1, 1)), ((2, 2, 2), (2, 1))):
        found = {item.axes: item.rings for item in estimate.traffic(work, layout, {}, torus)}
        assert (found["fsdp",], found["tensor",]) == rings


@pytest.fixture
def slice_of_v5e(monkeypatch):
    """The simulated devices stand for TPUs."""
    monkeypatch.setattr(compilation, "chip_of", lambda device: CHIP)


@pytest.mark.parametrize("model", ["dense", "dropless"])
def test_plans_can_be_run(model, slice_of_v5e):
    config = make_config(model)
    found = planner.plans(config, jax.devices())
    assert len({tuple(plan.sizes.values()) for plan in found}) >= 3
    for plan in found:
        mesh = meshes.make_mesh(plan.config.mesh, jax.devices())
        meshes.resolve(plan.config, mesh)
        assert dict(mesh.shape) == dict.fromkeys(meshes.AXES, 1) | plan.sizes
    fit = [plan for plan in found if plan.memory < planner.FULL * CHIP.memory * (1 << 30)]
    assert fit == found[: len(fit)]
    assert [plan.time.step for plan in fit] == sorted(plan.time.step for plan in fit)


RECIPES = {  # name in configs/runs/: the kind of its devices, the sides of its slice, devices of a chip
    "llama3.1-8b-v5e-256": ("TPU v5 lite", (16, 16), 1),
    "llama3.1-70b-v5p-512": ("TPU v5", (8, 8, 8), 1),
    "gemma3-27b-v6e-256": ("TPU v6 lite", (16, 16), 1),
    "qwen3-30b-a3b-v5p-128": ("TPU v5", (4, 4, 8), 1),
    "qwen3-32b-v6e-256": ("TPU v6 lite", (16, 16), 1),
    "deepseek-v3-v5p-1024": ("TPU v5", (8, 8, 16), 1),
    "gpt-oss-120b-tpu7x-128": ("TPU7x", (4, 4, 8), 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_plan_is_at_least_as_good_as_the_recipe(name):
    """By the estimates of both; and the recipe fits by estimate."""
    kind, sides, cores = RECIPES[name]
    places = [place for place in itertools.product(*map(range, sides)) for _ in range(cores)]
    devices = [SimpleNamespace(device_kind=kind, coords=place, slice_index=0) for place in places]
    config = load(str(ROOT / "configs" / "runs" / f"{name}.yml"), []).config
    layout = Layout(planner.abstract(dict(zip(meshes.AXES, meshes.sizes(config.mesh, len(devices)), strict=True))), config.mesh.rules)
    work, chip = Work.of(meshes.settle(config, on_cpu=False)), compilation.chip_of(devices[0])
    room = planner.FULL * chip.memory * compilation.GIB
    assert sum(estimate.memory(work, layout).values()) < room
    best = planner.plans(config, devices)[0]
    assert best.memory < room
    assert best.time.step <= estimate.time(work, layout, chip, estimate.traffic(work, layout, {}, sides)).step


def test_plan_that_is_pasted_is_the_plan(slice_of_v5e):
    plan = planner.plans(make_config(), jax.devices())[0]
    again = load(None, plan.lines).config
    assert {axis: getattr(again.mesh, axis) for axis in plan.sizes} == plan.sizes
    assert (again.remat, again.train.microbatches) == (plan.config.remat, plan.config.train.microbatches)


def test_plan_for_two_slices_names_what_lies_across(slice_of_v5e):
    devices = [SimpleNamespace(slice_index=number // 4) for number in range(8)]
    given = make_config(axes={"tensor": 2})
    for plan in planner.plans(given, devices):
        assert "mesh.dcn.data=2" in plan.lines or "mesh.dcn.fsdp=2" in plan.lines
        assert ("mesh.tensor=1" in plan.lines) == (plan.sizes["tensor"] == 1)  # the config says 2
        assert math.prod(meshes.sizes(plan.config.mesh, 8)) == 8


def test_advice_says_when_nothing_fits(monkeypatch):
    monkeypatch.setattr(compilation, "chip_of", lambda device: Chip(197, 1e-6, 819, 90, 6.25))
    assert "No mesh, remat or microbatches would fit" in planner.advice(make_config(), jax.devices())
    monkeypatch.setattr(compilation, "chip_of", lambda device: CHIP)
    assert planner.advice(make_config(), jax.devices()).count("mesh.fsdp") >= 1


def test_no_plan_is_refused(slice_of_v5e):
    config = make_config().model_copy(update={"data": schema.Data(batch_size=1, length=71)})
    with pytest.raises(Refused, match="no mesh of 8 devices can share this config"):
        planner.report(config, jax.devices(), "v5e:2x4")
