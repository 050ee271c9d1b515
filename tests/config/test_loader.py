"""Layers, where values come from, what YAML means, and that a written config reads back as the same one."""

import pathlib
import tempfile

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtrain.config import Config, Refused, dump, load, schema
from maxtrain.config.loader import Loaded, render
from maxtrain.config.section import MAX_FLOAT, MAX_INT

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files by name (`__` for a slash) into an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write_files(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write_files


# --------------------------------------------------------------------------------------------------------- layers


def test_no_file_gives_the_defaults():
    loaded = load(None)
    assert loaded.config == Config()
    assert loaded.origins == {}
    assert hash(loaded.config) == hash(Config())


def test_later_includes_win_then_the_file_then_the_command_line(write):
    write(
        a="train: {steps: 1, seed: 1, microbatches: 1, z_loss: 1}",
        b="train: {seed: 2, microbatches: 2, z_loss: 2}",
        run="include: [a.yml, b.yml]\ntrain: {microbatches: 4, z_loss: 3}",
    )
    train = load("run.yml", ["train.z_loss=4"]).config.train
    assert (train.steps, train.seed, train.microbatches, train.z_loss) == (1, 2, 4, 4.0)


def test_include_is_relative_to_the_including_file_and_may_be_a_path(write):
    write(base="train: {steps: 7}", runs__mid="include: ../base.yml", runs__run="include: mid.yml")
    loaded = load(pathlib.Path("runs/run.yml"))
    assert loaded.config.train.steps == 7
    assert str(loaded.origins["train.steps"]) == "base.yml:1"


def test_a_file_may_be_included_on_two_ways(write):
    write(base="train: {steps: 7}", a="include: base.yml\ntrain: {seed: 1}", b="include: base.yml", run="include: [a.yml, b.yml]")
    assert load("run.yml").config.train == schema.Train(steps=7, seed=1)


def test_lists_are_replaced_and_mappings_merged(write):
    write(
        base="optimizer: {decay: [matrix, bias]}\ndata: {sources: {a: {kind: synthetic, weight: 2}, b: {kind: synthetic}}}",
        run="include: base.yml\noptimizer: {decay: [norm]}\ndata: {sources: {a: {num_documents: 5}}}",
    )
    config = load("run.yml").config
    assert config.optimizer.decay == ("norm",)
    assert sorted(config.data.sources) == ["a", "b"]
    assert config.data.sources["a"] == schema.Source(kind="synthetic", weight=2.0, num_documents=5)


def test_replace_drops_the_lower_mapping(write):
    write(base="data: {sources: {a: {kind: text, path: p}, b: {kind: synthetic}}}", run="include: base.yml")
    override = "data.sources=!replace {c: {kind: synthetic}}"
    assert list(load("run.yml", [override]).config.data.sources) == ["c"]
    assert load("run.yml", ["data.sources.a=!replace {kind: synthetic}"]).config.data.sources["a"] == schema.Source(kind="synthetic")


@pytest.mark.parametrize("middle", ["model: {rope: !replace {}}", "model: {rope: null}"])
def test_what_replaces_one_layer_replaces_all_below_it(write, middle):
    """However the includes are grouped: a layer over the replacing one does not uncover what that one replaced."""
    write(a="model: {rope: {theta: 5.0}}", middle=middle, top="include: middle.yml\nmodel: {rope: {}}", run="include: [a.yml, top.yml]")
    assert load("run.yml").config.model.rope == schema.Rope()


def test_null_replaces_a_mapping(write):
    write(base="model: {rope: {scaling: {factor: 4}}}", run="include: base.yml\nmodel: {rope: {scaling: null}}")
    assert load("base.yml").config.model.rope.scaling == schema.RopeScaling(factor=4.0)
    assert load("run.yml").config.model.rope.scaling is None


def test_a_set_mapping_drops_the_default_one():
    assert list(load(None, ["data.sources.mine={kind: synthetic}"]).config.data.sources) == ["mine"]


def test_origins_are_those_of_the_winning_layer(write):
    write(base="train:\n  steps: 1\n  seed: 1", run="include: base.yml\n\ntrain:\n  seed: 2\nrun:\n  name:\n    x")
    loaded = load("run.yml", ["data.sources.x={kind: synthetic}"])
    assert {key: str(origin) for key, origin in loaded.origins.items()} == {
        "train": "run.yml:3",
        "train.steps": "base.yml:2",
        "train.seed": "run.yml:4",
        "run": "run.yml:5",
        "run.name": "run.yml:6",
        "data": "command line",
        "data.sources": "command line",
        "data.sources.x": "command line",
        "data.sources.x.kind": "command line",
    }


# --------------------------------------------------------------------------------------------------------- values

VALUES = [
    ("schedule.learning_rate", "1e-4", 1e-4),
    ("schedule.learning_rate", "3E5", 3e5),
    ("schedule.learning_rate", ".5", 0.5),
    ("schedule.learning_rate", "2", 2.0),
    ("train.steps", "1e6", 1_000_000),
    ("train.steps", "2.0", 2),
    ("train.steps", "1_000", 1000),
    ("mesh.fsdp", "-1", -1),
    ("checkpoint.resume", "False", False),
    ("optimizer.clip_norm", "null", None),
    ("optimizer.clip_norm", "", None),
    ("run.dir", "~", None),
    ("run.dir", "~/x", "~/x"),
    ("run.name", "no", "no"),
    ("run.name", "2024-01-01", "2024-01-01"),
    ("run.name", "1:30", "1:30"),
    ("run.name", "010", "010"),
    ("run.name", "1_", "1_"),
    ("run.name", "'1'", "1"),
    ("run.name", '"a\\tb"', "a\tb"),
    ("mesh.num_processes", "auto", "auto"),
    ("mesh.rules", "{embed: [data, fsdp]}", {"embed": ("data", "fsdp")}),
    ("metrics.sinks", "[jsonl]", ("jsonl",)),
]


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_values_mean_the_same_in_a_file_and_on_the_command_line(write, key, text, value):
    section, name = key.split(".")
    write(run=f"{section}: \n  {name}: {text}")
    for config in (load("run.yml").config, load(None, [f"{key}={text}"]).config):
        found = getattr(getattr(config, section), name)
        assert (found, type(found)) == (value, schema.FrozenDict if isinstance(value, dict) else type(value))


@pytest.mark.parametrize("text", ["1", "true", "1e-4", "a: b", "[a", "a #b", "*x", "@x", "!x", "a=b", "-"])
def test_text_needs_no_quotes_on_the_command_line(text):
    assert load(None, [f"run.name={text}"]).config.run.name == text


# ------------------------------------------------------------------------------------------------- dump and render


def assert_reads_back(config):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.yml"
        path.write_text(dump(config), encoding="utf-8")
        assert load(path).config == config


NAMES = st.text().filter(lambda name: "." not in name)
POSITIVE = st.floats(min_value=0, exclude_min=True, max_value=MAX_FLOAT)
PATHS = st.text(min_size=1).filter(lambda path: "\0" not in path)
SOURCES = st.builds(
    schema.Source, kind=st.just("text"), path=PATHS, pattern=st.text(), weight=POSITIVE, max_bytes=st.none() | st.integers(1, 2**63 - 1)
)
CONFIG = st.builds(
    schema.Config,
    run=st.builds(schema.Run, name=PATHS | st.sampled_from(["no", "1e-4", "null", "010", "1:30", "1_0", "~", "a: b", " x ", "a\nb"])),
    model=st.builds(
        schema.Model, rope=st.builds(schema.Rope, theta=POSITIVE, scaling=st.none() | st.builds(schema.RopeScaling, factor=POSITIVE))
    ),
    data=st.builds(schema.Data, sources=st.dictionaries(NAMES, SOURCES, min_size=1, max_size=3), batch_size=st.integers(1, MAX_INT)),
    optimizer=st.builds(
        schema.Optimizer, eps=POSITIVE, clip_norm=st.none() | POSITIVE, decay=st.lists(st.sampled_from(["matrix", "norm"])).map(tuple)
    ),
    checkpoint=st.builds(schema.Checkpoint, resume=st.booleans()),
)


@settings(max_examples=30, deadline=None)
@given(CONFIG)
def test_dump_reads_back(config):
    assert_reads_back(config)


MOE = schema.Model(
    slots={"local": schema.Slot(window=8), "moe": schema.Slot(feed_forward="moe", rope=schema.Rope(theta=5.0))},
    layer_pattern=("local", "moe"),
    moe=schema.Moe(num_experts=4, experts_per_token=2, mlp=8),
)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(model=MOE, schedule=schema.Schedule(kind="constant"), metrics=schema.Metrics(profile=schema.Profile(start=3))),
        Config(eval=schema.Eval(every=5, sets={"a": schema.Source(kind="stdlib", split="heldout")}), mesh=schema.Mesh(rules={})),
    ],
    ids=["default", "moe", "eval"],
)
def test_dump_reads_back_where_setting_a_key_could_be_refused(config):
    assert_reads_back(config)


@pytest.mark.parametrize(
    "name", ["no", "1e-4", "3E5", "1_0", "null", "~", "010", "1:30", "2024-01-01", "a: b", " x ", "a\nb\n", "!x", "*x"]
)
def test_text_stays_text(write, name):
    assert_reads_back(Config(run=schema.Run(name=name)))
    write(shown=render(Loaded(Config(run=schema.Run(name=name)), {})))
    assert load("shown.yml").config.run.name == name


def test_dump_names_every_value_and_suits_other_readers():
    text = dump(Config(run=schema.Run(name="1e-4")))
    assert yaml.safe_load(text) == Config(run=schema.Run(name="1e-4")).model_dump(mode="json")


def test_render_shows_where_each_value_was_set(write):
    write(run="train:\n  steps: 5\noptimizer:\n  decay: [norm,\n    bias]\n")
    loaded = load("run.yml", ["run.name=x"])
    lines = {line.split(":")[0].strip(): line for line in render(loaded).splitlines()}
    assert lines["name"].split() == ["name:", "x", "#", "command", "line"]
    assert lines["steps"].split() == ["steps:", "5", "#", "run.yml:2"]
    assert lines["decay"].split() == ["decay:", "[norm,", "bias]", "#", "run.yml:4"]
    assert lines["microbatches"].split() == ["microbatches:", "1", "#", "default"]
    assert len({lines[name].index("  # ") for name in ("name", "steps", "microbatches")}) == 1
    write(rendered=render(loaded))
    assert load("rendered.yml").config == loaded.config


def test_render_of_the_difference(write):
    write(run="train: {steps: 5, seed: 0}")
    assert render(load("run.yml"), diff=True) == "train:\n  steps: 5  # run.yml:1\n"
    assert render(load(None), diff=True) == "# every value is the default\n"


def test_refused_is_a_value_error():
    assert issubclass(Refused, ValueError)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_are_accepted(path):
    load(path)
