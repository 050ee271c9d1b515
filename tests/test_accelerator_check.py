"""The check of an accelerator: every part at toy size on the CPU, and what becomes of parts that fail."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "accelerator"


@pytest.fixture
def run(monkeypatch):
    """The module that runs the parts."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("run")


def test_smoke(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "accelerator_check.sh"), "--smoke", "--peer", "--out", str(tmp_path)]
    env = {**os.environ, "XLA_FLAGS": os.environ["MAXTRAIN_TEST_COMPILE"], "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["problems"] == []
    records = [line for process in result["processes"] for line in process["records"]]
    assert all(process["ended"] == "well" for process in result["processes"])
    assert {process["part"] for process in result["processes"]} == {"right", "fast", "peer", "serving"}
    checks = {line["name"] for line in records if line["kind"] == "check"}
    assert {"dense: losses in float32 against the CPU", "dense: norms in float32 against the CPU"} <= checks
    assert {"dense: losses in bfloat16 against float32", "attention by cudnn with a softcap is refused"} <= checks
    assert "dense: tokens of the engine against the training forward" in checks
    measured = {line["name"] for line in records if line["kind"] == "measure"}
    assert {"memory", "bfloat16 product", "1B dense, 2,048, xla", "1 requests", "3 requests", "cold start", "warm start"} <= measured
    facts = " ".join(line["name"] + line["text"] for line in records if line["kind"] == "fact")
    assert "attention by cudnn" in facts
    assert "not available here" in facts
    text = (tmp_path / "table.md").read_text()
    assert "toy sizes, which say nothing about speed" in text
    assert "| dense: losses in float32 against the CPU |" in text


def test_the_other_miniatures_are_what_they_are_named(monkeypatch):
    """Which the smoke test leaves out: a step of each takes long to compile."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(ROOT)
    right = importlib.import_module("right")
    models = {name: right.training.configure(*words, "precision.compute=float32").model for name, words in right.MINIATURES.items()}
    assert set(right.SMOKE) < set(models)
    assert models["mixture"].moe is not None
    assert models["latent attention"].mla is not None
    assert models["windows"].slots["sliding"].window == 16


PART = """
import record, sys, time

def good(rec):
    rec.measure("number", value=3.0)

def wrong(rec):
    rec.check("a value", float("nan"), 1.0)
    raise ValueError("the whole message")

def slow(rec):
    rec.measure("before", value=1.0)
    time.sleep(60)

def dies(rec):
    rec.measure("last words", value=2.0)
    print("a crash of the driver", file=sys.stderr, flush=True)
    import os
    os.abort()

record.main({"good": good, "wrong": wrong, "slow": slow, "dies": dies})
"""


def test_each_part_runs_even_if_another_fails(tmp_path, run, monkeypatch):
    """What was known before a crash or the end of its time is kept, and the first error is whole."""
    (tmp_path / "part.py").write_text(PART)
    (tmp_path / "record.py").symlink_to(FOLDER / "record.py")
    monkeypatch.setattr(run, "HERE", str(tmp_path))
    monkeypatch.setattr(run, "LEAST", 1)
    part = run.Part("part", 20, {"wrong": 10, "dies": 10, "slow": 2, "good": 10}, ())
    done = run.run([part], smoke=False)
    names = {process["cases"][0]: [line["name"] for line in process["records"]] for process in done}
    assert names["slow"] == ["before"]
    assert names["dies"] == ["last words"]
    assert names["good"] == ["number", "good: the case"]
    assert [process["ended"] for process in done][0::3] == ["well", "well"]
    assert done[2]["ended"] == "cut off after 2 s"
    wrong = run.problems(done)
    assert [each["where"] for each in wrong] == ["part: a value", "part: wrong", "part: dies", "part: slow"]
    assert "ValueError: the whole message" in wrong[1]["text"]
    assert "a crash of the driver" in wrong[2]["text"]


def test_parts_end_within_eight_minutes(run):
    for peer in (False, True):
        assert sum(260 if part.name == "fast" and not peer else part.seconds for part in run.PARTS if peer or part.name != "peer") <= 480
