"""A run's folder: its files are as they were written or refused, one trainer at a time, and what may change when it goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data import integrity
from maxtrain.data.tokenizer import load_saved
from maxtrain.models.families.family import NOT_FUNCTION, NOT_FUNCTION_MOE, NOT_FUNCTION_MTP, function
from maxtrain.training import run as runs

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def folder(tmp_path):
    """A run that was written by this version: config.yml and tokenizer have hashes."""
    shutil.copytree(RUNS / "dense", tmp_path / "run")
    contents = {"config.yml": (RUNS / "dense" / "config.yml").read_bytes()} | runs.tokenizer_files(tmp_path / "run")
    integrity.rewrite(tmp_path / "run", contents, integrity.RUN_MANIFEST)
    return tmp_path / "run"


def listing(folder):
    """Everything that looking could change."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- verified files


@pytest.mark.parametrize("name", ["config.yml", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "files.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_a_changed_file_is_refused_by_name(folder, name, harm, capsys):
    runs.read_config(str(folder))
    assert capsys.readouterr().err == ""
    content = (folder / name).read_bytes()
    match harm:
        case "flipped":
            middle = content.index(b"a", len(content) // 2)
            (folder / name).write_bytes(content[:middle] + b"b" + content[middle + 1 :])
        case "cut":
            (folder / name).write_bytes(content[: len(content) // 2])
        case "missing":
            (folder / name).unlink()
    before = listing(folder)
    if (name, harm) == ("files.json", "missing"):  # as a run of an earlier version
        runs.read_config(str(folder))
        assert "no hashes yet" in capsys.readouterr().err
    else:
        with pytest.raises(Refused, match=name):
            runs.read_config(str(folder))
    assert listing(folder) == before


def test_a_trainer_writes_anew_what_is_missing_and_refuses_what_has_changed(folder):
    (folder / "config.yml").unlink()
    runs.check_files(str(folder), pytest.fail, resuming=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"tokenizer\.json has changed"):
        runs.check_files(str(folder), pytest.fail, resuming=True)
    (folder / "tokenizer").rename(folder / "away")  # the remedy
    runs.check_files(str(folder), pytest.fail, resuming=True)


def test_files_beside_the_tokenizer_are_named(folder, capsys):
    (folder / "tokenizer" / "chat_template.jinja").write_text("")
    runs.read_config(str(folder))
    assert "tokenizer/chat_template.jinja" in capsys.readouterr().err


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_kill_while_files_are_replaced_leaves_what_the_hashes_allow(folder, monkeypatch, stop):
    calls, replace = [], integrity.replace

    def killed(path, content):
        calls.append(path)
        if len(calls) == stop:
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(integrity, "replace", killed)
    try:
        integrity.rewrite(folder, {"config.yml": b"new: 1\n", "manifest.json": b"{}", "more": b"1"}, integrity.RUN_MANIFEST)
    except KeyboardInterrupt:
        assert len(calls) == stop
    wrong = integrity.damage(folder, integrity.RUN_MANIFEST)
    assert not [line for line in wrong if not line.endswith("is missing")]
    assert stop < 6 or (folder / "config.yml").read_bytes() == b"new: 1\n"


def test_files_that_are_the_same_are_not_written_again(folder):
    before = listing(folder)
    contents = {"config.yml": (folder / "config.yml").read_bytes()} | runs.tokenizer_files(folder)
    integrity.rewrite(folder, contents, integrity.RUN_MANIFEST)
    assert listing(folder) == before


# ----------------------------------------------------------------------------------------------------- one trainer


def test_a_second_trainer_is_refused_and_told_of_the_first(tmp_path):
    code = "from maxtrain.training import run; lock = run.Lock(sys.argv[1]); lock.hold(); print('held', flush=True); time.sleep(60)"
    code = f"import sys, time; {code}"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        lock = runs.Lock(str(tmp_path))
        with pytest.raises(Refused, match=rf"process {first.pid} on .* trains here"):
            lock.hold()
        first.kill()
        first.wait()
    lock.hold()
    lock.hold()  # it is held already
    other = runs.Lock(str(tmp_path))
    with pytest.raises(Refused, match="trains here"):
        other.hold()
    lock.release()
    other.hold()
    other.release()


# --------------------------------------------------------------------------------------------------- nothing is lost


def test_a_run_without_a_checkpoint_begins_anew_only_if_it_never_had_one(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1.0, "checkpoint_seconds": 0.0}\n{"step": 2, "lo')
    runs.check_nothing_lost(str(tmp_path), [], [])
    with pytest.raises(Refused, match=r"(?s)20: bad.*no good checkpoint is left \(there are steps \[20\]\)"):
        runs.check_nothing_lost(str(tmp_path), [20], ["20: bad"])
    metrics.write_text('[]\n{"step": 3, "loss": 1.0, "checkpoint_seconds": 0.5}\n')  # of an earlier version
    with pytest.raises(Refused, match="steps none"):
        runs.check_nothing_lost(str(tmp_path), [], [])
    (tmp_path / "checkpoints" / "2.new").mkdir(parents=True)  # the first was being written
    runs.check_nothing_lost(str(tmp_path), [], [])
    runs.note_checkpoint(str(tmp_path), 2)
    with pytest.raises(Refused, match="no good checkpoint is left"):
        runs.check_nothing_lost(str(tmp_path), [], [])


# -------------------------------------------------------------------------------------------------- what may change


def config(**model):
    keys = json.loads((RUNS / "mixture" / "checkpoints" / "4" / "record.json").read_text())["meta"]["config"]
    for key, value in model.items():
        section = keys
        *path, last = key.split("__")
        for part in path:
            section = section[part]
        section[last] = value
    return schema.Config.model_validate(keys)


OLD = config().model_dump(mode="json")
MAY = {
    "model__layers": "unroll",
    "model__init_scale": 0.5,
    "model__init_from": "elsewhere",
    "model__max_length": 128,
    "model__mtp__loss_weight": 0.1,
    "model__moe__dispatch": "capacity",
    "model__moe__aux_loss": 0.01,
    "model__moe__router_z_loss": 0.001,
    "model__moe__balance_rate": 0.0,
    "data__batch_size": 4,
    "data__tokenizer": {"kind": "huggingface", "path": "elsewhere", "vocab_size": None, "train_bytes": 20_000_000},
    "optimizer__weight_decay": 0.3,
    "schedule__learning_rate": 1.0,
}
MAY_NOT = {
    "model__moe__balance_rate": None,
    "model__moe__experts_per_token": 1,
    "model__mtp__num_layers": 2,
    "model__mtp": None,
    "model__norm_eps": 1e-6,
    "model__rope__theta": 5.0,
    "precision__moments": "bfloat16",
    "guard__window": 16,
}


@pytest.mark.parametrize("key", MAY)
def test_what_is_no_function_may_change(key):
    (line,) = [line for line in runs.check_resume(OLD, config(**{key: MAY[key]})) if not line.startswith("data.tokenizer.kind")]
    assert line.startswith(key.replace("__", "."))


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_is_the_function_may_not(key):
    with pytest.raises(Refused, match=key.replace("__", ".")):
        runs.check_resume(OLD, config(**{key: MAY_NOT[key]}))


def test_both_lists_are_one():
    """Every key that leaves `function` as it is may change, and no other of the section `model` but the context's limit."""
    for section, names in (("", NOT_FUNCTION), ("moe__", NOT_FUNCTION_MOE), ("mtp__", NOT_FUNCTION_MTP)):
        for name in names:
            assert runs.may_change(f"model.{section}{name}".replace("__", "."), 0.1, 0.2)
    for changes, free in ((MAY, True), (MAY_NOT, False)):
        for key, value in changes.items():
            if key.startswith("model__") and key != "model__max_length":
                assert (function(config(**{key: value}).model) == function(config().model)) == free, key


def test_keys_that_did_not_exist_yet_have_their_defaults():
    old = json.loads(json.dumps(OLD))
    del old["model"]["embed_scale" if "embed_scale" in old["model"] else "norm_eps"]
    old["model"].pop("final_softcap", None)
    assert runs.check_resume(old, schema.Config.model_validate(old)) == []


# ------------------------------------------------------------------------------------------------- only its own folder


def test_a_run_that_goes_on_takes_its_tokenizer_from_its_own_folder(folder):
    asked = schema.Config.model_validate(json.loads((folder / "checkpoints" / "4" / "record.json").read_text())["meta"]["config"])
    asked = asked.model_copy(update={"run": schema.Run(dir=str(folder))})
    assert runs.own_tokenizer(asked).fingerprint == load_saved(folder / "tokenizer").fingerprint
    other = asked.data.model_copy(update={"tokenizer": schema.Tokenizer(kind="bpe", vocab_size=300)})
    assert runs.own_tokenizer(asked.model_copy(update={"data": other})) is None  # what is asked for is made, and found to be another
    shutil.rmtree(folder / "checkpoints")
    assert runs.own_tokenizer(asked) is None
