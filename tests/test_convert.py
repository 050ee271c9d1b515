"""The entry `convert`, `maxtrain.load` and `model.init_from`: a model goes out and comes back, and training starts from it."""

import json

import jax
import numpy as np
import pytest

import maxtrain
from maxtrain.config import Refused, load
from maxtrain.convert import main
from maxtrain.parallel import mesh
from maxtrain.training.loop import Trainer
from maxtrain.training.run import open_run

TOKENS = np.random.default_rng(0).integers(0, 256, (8, 24)).astype(np.int32)
DATA = {"sources": "{s: {kind: synthetic, num_documents: 40, document_length: 60}}", "length": 32, "batch_size": 8}


def arguments(tmp_path, cache_dir, **more):
    keys = {f"data.{key}": value for key, value in DATA.items()} | {"data.cache_dir": cache_dir, "run.compile_cache": "null"}
    keys |= {"run.dir": tmp_path / "tuned", "train.steps": 2, "metrics.sinks": "[jsonl]", "metrics.peak_tflops": 1}
    return [f"{key}={value}" for key, value in (keys | more).items()]


def train(words, path=None):
    trainer = Trainer(load(path, words).config)
    trainer.fit()
    return trainer


def first_loss(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row.get("step") == 1 and "loss" in row)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    make_mesh = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg, devices=None: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A trained run as a folder of Hugging Face's."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["to-hf", str(trained), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory):
    """And back as a run."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    assert main(["from-hf", str(exported), str(folder), "run.compile_cache=null"]) == 0
    return folder


@pytest.fixture(scope="module")
def fresh_loss(tmp_path_factory, cache_dir):
    """The first loss of a model that starts from nothing, on the same data."""
    folder = tmp_path_factory.mktemp("fresh")
    train([*arguments(folder, cache_dir), "model.vocab_size=260"])
    return first_loss(folder / "tuned")


def test_there_and_back_is_bit_identical(trained, exported, imported):
    _, tokenizer, want, step = open_run(str(trained))
    _, again, got, zero = open_run(str(imported))
    assert (step, zero) == (20, 0)
    assert tokenizer.fingerprint == again.fingerprint
    assert {path.name for path in exported.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


def test_load_opens_all_forms(trained, exported, imported):
    want = maxtrain.load(trained)(TOKENS)
    assert (want.shape, want.dtype) == ((8, 24, 260), np.float32)
    for path in (trained / "checkpoints" / "20", exported, imported):
        model = maxtrain.load(path)
        np.testing.assert_array_equal(model(TOKENS), want)
        assert model.config.model.vocab_size == 260
        assert model.tokenizer.decode(model.tokenizer.encode("né")) == "né"


def test_load_without_tokenizer(exported, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    model = maxtrain.load(tmp_path)
    assert model.tokenizer is None
    with pytest.raises(ValueError, match="0 to 259"):
        model(np.full((1, 4), 260))
    with pytest.raises(ValueError, match="integers"):
        model(np.zeros((1, 4)))


@pytest.mark.parametrize("form", ["trained", "exported", "imported"])
def test_training_starts_from_any_form(form, request, tmp_path, cache_dir, fresh_loss):
    path = request.getfixturevalue(form)
    trainer = train(arguments(tmp_path, cache_dir, **{"model.init_from": path, "schedule.learning_rate": 1e-6}))
    assert trainer.config.model.embed == 32  # the section comes from the source
    assert first_loss(tmp_path / "tuned") < fresh_loss - 0.3
    before, after = jax.tree.leaves(maxtrain.load(path).model), jax.tree.leaves(trainer.state.model)
    moved = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(before, after, strict=True))
    assert 0 < moved < 1e-4


def test_section_that_agrees_may_be_written_out(trained, tmp_path, cache_dir):
    train(arguments(tmp_path, cache_dir, **{"model.init_from": trained}), str(trained / "config.yml"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model.embed": 96}, ["model.init_from", "embed: 96 here, 32 in"]),
        ({"model.init_scale": 2.0}, ["init_scale has no effect"]),
        ({"data.length": 128}, ["data.length", "64"]),
        ({"data.tokenizer": "{kind: bpe, vocab_size: 260}"}, ["data.tokenizer", "other words"]),
    ],
)
def test_disagreement_is_refused(keys, words, trained, tmp_path, cache_dir):
    with pytest.raises(Refused) as refusal:
        train(arguments(tmp_path, cache_dir, **{"model.init_from": trained}, **keys))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to-hg", "a", "b"], "did you mean to-hf"),
        (["to-hf", "a"], "two paths"),
        (["to-hf", "nowhere", "b"], "config.yml is missing"),
        (["from-hf", "nowhere", "b"], r"config\.json: cannot be read"),
        (["from-gguf", "nowhere", "b"], "cannot be read"),
        (["from-hf", "{hf}", "{hf}"], "something is there already"),
        (["from-hf", "{hf}", "b", "model.norm_eps=1e-3"], "model.norm_eps"),
        (["from-hf", "{hf}", "b", "--dtype", "bfloat16"], "precision.params"),
        (["to-hf", "{run}", "b", "--dtype", "int8"], "one of float32"),
        (["to-hf", "{run}", "b", "--family", "lama"], "did you mean llama"),
        (["to-hf", "{run}", "b", "--family", "mixtral"], "the model is no mixtral"),
        (["to-hf", "{run}/checkpoints/7", "b"], "no complete checkpoint of step 7"),
    ],
)
def test_refusals_leave_nothing_behind(words, message, trained, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=message):
        main([word.format(hf=exported, run=trained) for word in words])
    assert not list(tmp_path.iterdir())


def test_export_in_bfloat16(trained, tmp_path):
    assert main(["to-hf", str(trained / "checkpoints" / "20"), str(tmp_path / "half"), "--dtype", "bfloat16", "--family", "mistral"]) == 0
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["eos_token_id"]) == ("mistral", "bfloat16", 257)
    got, want = maxtrain.load(tmp_path / "half")(TOKENS), maxtrain.load(trained)(TOKENS)
    assert 0 < np.abs(got - want).max() / np.abs(want).max() < 0.05
