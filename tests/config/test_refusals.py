"""Broken configs, one a row, and what their message must say: the place, the key, the value, the remedy."""

import os
import pwd
import re
import time

import pytest

from maxtrain.config import Refused, keys, load
from maxtrain.config.paths import expand
from maxtrain.serving import lines
from maxtrain.training.pretrained import open_source, settle
from maxtrain.training.run import locate

MOE = "model: {slots: {layer: {feed_forward: moe}}, moe: {num_experts: 8, experts_per_token: 2, mlp: 8, @}}"
BROKEN = [
    # unknown keys
    ("train: {step: 5}", "run.yml:1: unknown key train.step; did you mean train.steps?"),
    ("train:\n  steps: 5\nlearning_rate: 1", "run.yml:3: unknown key learning_rate; did you mean schedule.learning_rate?"),
    ("optimizer:\n  learning_rate: 1", "run.yml:2: unknown key optimizer.learning_rate; did you mean schedule.learning_rate?"),
    ("lr: 1", "run.yml:1: unknown key lr; a config has run, model,"),
    ("mesh: {rules: {embd: fsdp}}", "unknown key mesh.rules.embd; did you mean mesh.rules.embed?"),
    ("mesh: {rules: {embed: fsdq}}", "fsdq"),
    ("mesh: {tensor: 2, rules: {embed: fsdp}}", "no rule splits anything over tensor"),
    ("mesh: {context_attention: ring}", "mesh: context_attention has no effect, as no sequence is split: set context above 1 or"),
    ("mesh: {context: 1, context_order: natural}", "mesh: context_order has no effect, as no sequence is split"),
    (
        "mesh: {context: 2, context_attention: gather, context_order: natural}",
        "mesh: context_order has no effect with context_attention: gather; remove one of them",
    ),
    ("mesh: {context: 2, context_attention: rnig}", "mesh.context_attention: rnig is refused: write auto, ring, all_to_all or gather"),
    ("train: {attention: flash}", "train.attention: flash is refused: write auto, xla, splash or cudnn"),
    (
        "data:\n  sources:\n    web: {kind: text, pth: x}",
        "run.yml:3: unknown key data.sources.web.pth; did you mean data.sources.web.path?",
    ),
    ("train.steps: 5", "run.yml:1: the key train.steps has a dot"),
    # types, ranges, choices
    ("train:\n\n  steps: abc", "run.yml:3: train.steps: abc is refused: write a whole number >= 1 (Optimizer steps"),
    ("train: {steps: 1.5}", "train.steps: 1.5 is refused: write a whole number >= 1"),
    ("train: {steps: 0}", "train.steps: 0 is refused: write a whole number >= 1"),
    ("train: {steps: true}", "train.steps: true is refused: write a whole number"),
    ("train: {steps: '100'}", "train.steps: '100' is refused: write a whole number"),
    ("train: {steps: }", "train.steps: null is refused: write a whole number"),
    ("train: {steps: [1, 2]}", "train.steps: [1, 2] is refused"),
    ("train: {steps: {a: 1}}", "train.steps: {a: 1} is refused"),
    ("optimizer: {kind: adamv}", "optimizer.kind: adamv is refused: write adamw; did you mean adamw?"),
    (
        "optimizer: {decay: [matrx]}",
        "optimizer.decay: matrx is refused: write a list of matrix, embedding, norm or bias; did you mean matrix?",
    ),
    ("optimizer: {b1: 1.5}", "optimizer.b1: 1.5 is refused: write a number >= 0 and < 1"),
    ("optimizer: {b2: 1}", "optimizer.b2: 1 is refused: write a number >= 0 and < 1"),
    ("precision: {compute: bf16}", "precision.compute: bf16 is refused: write float32, bfloat16, float16 or auto; did you mean bfloat16?"),
    ("run: {name: 3}", "run.name: 3 is refused: write text, in quotes: '3'"),
    ("run: {name: true}", "run.name: true is refused: write text, in quotes: 'true'"),
    ("train:", "run.yml:1: train: null is refused: write a section (steps, seed,"),
    ("train: 5", "train: 5 is refused: write a section (steps, seed,"),
    ("model: {moe: {mlp: 8, num_experts: 4}}", "model.moe.experts_per_token is missing: write a whole number >= 1"),
    (
        "data: {sources: {stdlib: {max_bytes: 9}}}",
        "sources.stdlib.kind is missing: write stdlib, text, jsonl or synthetic; the default of data.sources is gone",
    ),
    ("schedule: {learning_rate: .nan}", "schedule.learning_rate: '.nan' is refused: write a number > 0"),
    ("schedule: {learning_rate: 1e999}", "schedule.learning_rate: .inf is refused: write a number > 0"),
    (f"train: {{steps: {'9' * 5000}}}", "train.steps: .inf is refused: write a whole number"),
    # scalars that YAML 1.1 takes for something else
    ("checkpoint: {resume: no}", "checkpoint.resume: 'no' is refused: write true or false"),
    ("checkpoint: {resume: ON}", "checkpoint.resume: 'ON' is refused: write true or false"),
    ("train: {steps: 1:30}", "train.steps: '1:30' is refused: write a whole number"),
    ("train: {steps: 010}", "train.steps: '010' is refused: write a whole number"),
    ("train: {steps: 0x10}", "train.steps: '0x10' is refused: write a whole number"),
    # keys that do not fit together
    (
        "model: {rope: {fraction: 0.2}}",
        "model: rotary embedding turns pairs: 0.2 (rope.fraction) of the head width 16 must be even and above 0",
    ),
    ("model: {rope: {scaling: {kind: linear, beta_fast: 9}}}", "beta_fast has no effect with kind: linear; it is read by yarn"),
    ("model: {rope: {scaling: {kind: yarn, mscale: 2}}}", "mscale and mscale_all_dim only have an effect together: set both or none"),
    (
        "model: {rope: {scaling: {kind: yarn, mscale: 2, mscale_all_dim: 1, attention_factor: 1}}}",
        "mscale has no effect beside attention_factor: remove one of them",
    ),
    (
        "model: {rope: {scaling: {kind: longrope, short_factors: [1, 2]}}}",
        "longrope needs as many short_factors as long_factors, one for each rotated pair: there are 2 and 0",
    ),
    (
        "model: {rope: {scaling: {kind: longrope, short_factors: [1, 2], long_factors: [1, 2]}}}",
        "rope.scaling has factors for 2 pairs, 8 are rotated",
    ),
    ("model: {rope: {scaling: {kind: yarn, long_factors: [1]}}}", "long_factors has no effect with kind: yarn; it is read by longrope"),
    (
        "model: {mlp_bias: true, slots: {layer: {feed_forward: moe}}, moe: {num_experts: 2, experts_per_token: 1, mlp: 8}}",
        "mlp_bias has no effect: no layer in use has a dense feed-forward",
    ),
    ("model: {mla: {}, num_kv_heads: 4, head_dim: 16}", "head_dim, num_kv_heads: of no effect with mla, remove it"),
    ("model: {mla: {rope_dim: 5}}", "1 (rope.fraction) of mla.rope_dim 5 must be even"),
    ("model: {rope: {scaling: {kind: yarn, beta_fast: 0.5}}}", "beta_fast must not be below beta_slow"),
    ("model: {slots: {layer: {rotary: false, rope: {theta: 9}}}}", "rope has no effect with rotary: false; remove one of them"),
    ("model: {norm_placement: both}", "model.norm_placement: both is refused: write pre, post, sandwich or parallel"),
    ("model:\n  embed: 60\n  num_heads: 5", "run.yml:3: model: num_heads=5 is not a multiple of num_kv_heads=2"),
    ("model:\n  layer_pattern: [local]", "run.yml:2: model: layer_pattern or prefix names ['local']"),
    (
        "data:\n  batch_size: 9\ntrain:\n  microbatches: 2",
        "run.yml:4: train.microbatches: 2 does not divide data.batch_size=9 (data.batch_size: run.yml:2)",
    ),
    ("data:\n  length: 4096", "run.yml:2: data.length: 4096 is longer than model.max_length=2048"),
    ("data:\n  sources: {}", "run.yml:2: data.sources: sources is empty"),
    ("data:\n  tokenizer:\n    kind: bpe", "run.yml:3: data.tokenizer: kind: bpe needs vocab_size"),
    ("checkpoint: {best: eval/x/loss}", "checkpoint.best: 'eval/x/loss' is not measured"),
    ("schedule: {kind: constant, final_fraction: 0.5}", "schedule: kind: constant does not read final_fraction: remove it"),
    # routers
    (MOE.replace("@", "shared_gate: true"), "model.moe: shared_gate has no effect without a shared expert"),
    (MOE.replace("@", "num_groups: 3"), "model.moe: num_groups=3 does not divide num_experts=8"),
    (MOE.replace("@", "groups_per_token: 2"), "model.moe: groups_per_token=2 is more than num_groups=1"),
    (MOE.replace("@", "group_score: top2"), "model.moe: group_score has no effect when every group is chosen"),
    (MOE.replace("@", "num_groups: 8, groups_per_token: 2, group_score: top2"), "model.moe: group_score: top2 needs groups of two experts"),
    (MOE.replace("@", "num_groups: 8, groups_per_token: 1"), "model.moe: experts_per_token=2 is more than the 1 experts of the groups"),
    # YAML itself
    ("train: {steps: 1}\nrun:\n  name: a\n  name: b", "run.yml:4: the key name is set twice, first in line 3"),
    (
        "train:\n\tsteps: 1",
        "run.yml:2: while scanning for the next token, found character '\\t' that cannot start any token (indent with spaces",
    ),
    ("train: {steps: 1\nrun:", "while parsing a flow mapping, expected ',' or '}'"),
    ("a: b: c", "run.yml:1: mapping values are not allowed here"),
    (
        "train:\n  steps: !!python/object/apply:os.abort []",
        "run.yml:2: the tag tag:yaml.org,2002:python/object/apply:os.abort is not supported",
    ),
    ("train:\n  steps: !!int '3'", "run.yml:2: the tag tag:yaml.org,2002:int is not supported"),
    ("train: {steps: !replace 3}", "run.yml:1: !replace must stand before a mapping"),
    ("a: &x {b: 1}\ntrain:\n  <<: *x", "run.yml:3: the alias *x is not supported (nor are merge keys): share values with include:"),
    ("a: &x [*x]", "run.yml:1: the alias *x is not supported"),
    ("? [a]\n: 1", "run.yml:1: a key must be a word"),
    ("- a\n- b", "run.yml:1: a config is a mapping of sections"),
    ("# nothing\n", "run.yml:1: the file is empty"),
    ("", "run.yml:1: the file is empty"),
    ("train: {steps: 1}\n---\ntrain: {steps: 2}", "run.yml:2: expected a single document in the stream, but found another document"),
    ("train:\n  steps: \x07", "run.yml:2: the character #x0007 is not allowed in YAML"),
    ("[" * 5000, "run.yml:1: nested more than 30 levels deep"),
    (b"run:\n  name: caf\xe9", "run.yml:2: not UTF-8 text"),
    # includes
    ("train: {}\ninclude: basis.yml", "run.yml:2: include: basis.yml: cannot be read: No such file or directory; did you mean base.yml?"),
    ("include: [base.yml, 3]", "run.yml:1: include must be a file name or a list of file names"),
    ("include:", "run.yml:1: include must be a file name or a list of file names"),
    ("include: run.yml", "run.yml:1: include: the files include each other in a circle: run.yml -> run.yml"),
    ("include: there.yml", "there.yml:1: include: the files include each other in a circle: run.yml -> there.yml -> run.yml"),
    ("include: wrong.yml", "wrong.yml:2: train.steps: abc is refused"),
    ("include: .", "run.yml:1: include: .: it is a folder"),
]
OTHERS = {"base.yml": "train: {seed: 1}", "there.yml": "include: run.yml", "wrong.yml": "train:\n  steps: abc"}
BROKEN_OVERRIDES = [
    (["train.steps"], "command line: 'train.steps' sets nothing: write section.key=value"),
    (["=5"], "command line: '=5' sets nothing"),
    (["train.step=5"], "command line: unknown key train.step; did you mean train.steps?"),
    (["train.steps=x"], "command line: train.steps: x is refused: write a whole number >= 1"),
    (["train.steps="], "command line: train.steps: null is refused"),
    (["train.steps=["], "(in train.steps=[)"),
    (["train.steps=!!int 3"], "command line: the tag tag:yaml.org,2002:int is not supported: only !replace is (in train.steps=!!int 3)"),
    (["train.steps=3", "train.steps=4"], "command line: train.steps is set twice"),
    (["run.name=null"], "command line: run.name: null is refused: write text"),
    (["data.length=4096"], "command line: data.length: 4096 is longer than model.max_length=2048"),
    (["model.layer_pattern=layer"], "command line: model.layer_pattern: layer is refused: write a list of text"),
    (["train..steps=3"], "command line: unknown key train."),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in OTHERS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_file_is_refused(folder, text, message):
    (folder / "run.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused) as refusal:
        load("run.yml")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("overrides", "message"), BROKEN_OVERRIDES, ids=range(len(BROKEN_OVERRIDES)))
def test_broken_override_is_refused(overrides, message):
    with pytest.raises(Refused) as refusal:
        load(None, overrides)
    assert message in str(refusal.value)


def test_all_problems_are_reported_at_once(folder):
    (folder / "run.yml").write_text("include: wrong.yml\nlr: 1\nmodel:\n  num_heads: 3\noptimizer: {b1: 2, b2: x}\n")
    with pytest.raises(Refused) as refusal:
        load("run.yml", ["run.nam=x"])
    starts = [line.split(": ")[0] for line in str(refusal.value).splitlines()]
    assert sorted(starts) == ["command line", "run.yml:2", "run.yml:4", "run.yml:5", "run.yml:5", "wrong.yml:2"]


def test_all_clashes_between_sections_are_reported_at_once():
    with pytest.raises(Refused) as refusal:
        load(None, ["train.microbatches=3", "data.length=4096", "schedule.warmup_steps=200"])
    assert [line.split(": ")[1] for line in str(refusal.value).splitlines()] == [
        "train.microbatches",
        "data.length",
        "schedule.warmup_steps",
    ]


@pytest.mark.parametrize(
    ("path", "message"), [("bse.yml", "did you mean base.yml?"), (".", "it is a folder"), ("no/x.yml", "No such file")]
)
def test_path_that_is_no_file_is_refused(folder, path, message):
    with pytest.raises(Refused) as refusal:
        load(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert message in str(refusal.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_refused(folder):
    (folder / "base.yml").chmod(0)
    with pytest.raises(Refused, match=r"base.yml: Permission denied"):
        load("base.yml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=4294967296", "train.seed: 4294967296 is refused: write a whole number >= 0 and < 4294967296"),
        ("train.steps=2147483648", "train.steps: 2147483648 is refused: write a whole number >= 1, at most 2,147,483,647"),
        ("schedule.learning_rate=1e39", "is refused: write a number > 0, at most"),
        ("guard.window=100000000000", "guard.window: 100000000000 is refused: write a whole number >= 8 and <= 1000000"),
        ("model.num_layers=1000000", "write a whole number >= 1 and <= 10000"),
        ("mesh.coordinator=localhost:abc mesh.num_processes=2 mesh.process_id=0", "host:port with a port from 1 to 65535"),
        ("mesh.coordinator=localhost:70000 mesh.num_processes=2 mesh.process_id=0", "host:port with a port from 1 to 65535"),
        ("mesh.coordinator=:80 mesh.num_processes=2 mesh.process_id=0", "host:port with a port from 1 to 65535"),
        ("mesh.coordinator=host:80 mesh.num_processes=2 mesh.process_id=2", "process_id=2 must be below num_processes=2"),
        ("mesh.num_processes=2", "num_processes=2 needs coordinator and process_id"),
        ("mesh.process_id=1", "process_id=1 must be below num_processes=1"),
        ('run.dir="a\\0b"', "run.dir: a path has no character NUL"),
        ('data.cache_dir=""', "data.cache_dir: the path is empty"),
        ('serve.sampling.logit_bias={code: 1.0}', "serve.sampling.logit_bias: the key code is refused: write a whole number >= 0"),
        ("metrics.sinks=[jsonl, jsonl]", "metrics.sinks: sinks names one twice"),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(override, message):
    with pytest.raises(Refused) as refusal:
        load(None, override.split(" ") if override.startswith("mesh") else [override])
    assert message in str(refusal.value)


def test_every_number_has_bounds():
    """Of all keys that take a number, on both sides."""
    for path, field in keys.walk():
        for option in keys.options(field):
            if option.annotation in (int, float):
                bounds = {name for bound in option.metadata for name in ("ge", "gt", "le", "lt") if getattr(bound, name, None) is not None}
                assert len(bounds) == 2, path


def test_what_no_config_is_is_refused_at_once(folder):
    """Large, endless, deep and repeated input."""
    os.mkfifo("fifo.yml")
    (folder / "large.yml").write_text("run: {name: x}\n" + "#" * 2**20)
    (folder / "run0.yml").write_text("train: {steps: 1}")
    for index in range(1, 26):  # twice as many files with each
        (folder / f"run{index}.yml").write_text(f"include: [run{index - 1}.yml, run{index - 1}.yml]")
    (folder / "many.yml").write_text("".join(f"key{index}: 1\n" for index in range(2000)))
    (folder / "long.yml").write_text("? " + "k" * 500_000 + "\n: 1")
    start = time.process_time()
    for name, message in {
        "fifo.yml": "fifo.yml: it is a fifo, a regular file is expected",
        "/dev/zero": "/dev/zero: it is a device",
        "large.yml": "more than 1,048,576 bytes",
        "run25.yml": "more than 200 files are included",
        "many.yml": "... and 1980 more",
        "long.yml": "unknown key",
    }.items():
        with pytest.raises(Refused, match=re.escape(message)):
            load(name)
    assert time.process_time() - start < 10


def test_paths_begin_at_home_wherever_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yml").write_text("run: {dir: ~/x}")
    (tmp_path / "prompts.txt").write_text("one")
    assert load("~/run.yml").config.run.folder == str(tmp_path / "x")
    assert lines.read("~/prompts.txt") == ["one"]
    assert locate("~/x/checkpoints/3") == (str(tmp_path / "x"), 3)
    with pytest.raises(Refused, match=re.escape(f"{tmp_path}/nothing")):
        open_source("~/nothing")
    with pytest.raises(Refused, match=r"model\.init_from: a path has no character NUL"):
        settle(load(None, [f"run.dir={tmp_path}", "model.init_from=a\0b"]).config)


def test_a_mapping_of_a_config_cannot_be_changed():
    sources = load(None, ["data.sources.a.kind=synthetic"]).config.data.sources
    for change in (sources.clear, sources.popitem, lambda: sources.update(b=1), lambda: sources.pop("a")):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert list(sources) == ["a"]


def test_an_include_with_the_character_nul_is_refused(tmp_path):
    (tmp_path / "run.yml").write_text('include: "a\\0b.yml"')
    with pytest.raises(Refused, match="include: a path has no character NUL"):
        load(tmp_path / "run.yml")


def test_home_that_is_unknown_is_refused(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    config = load(None, ["run.dir=~/x", "data.cache_dir=~nobody-of-this-name/x"]).config
    with pytest.raises(Refused, match=re.escape("run.dir: ~/x: the home folder is unknown (HOME is not set)")):
        _ = config.run.folder
    with pytest.raises(Refused, match="there is no user 'nobody-of-this-name'"):
        expand(config.data.cache_dir, "data.cache_dir")
