"""A model is asked while it is trained: what it says is what its checkpoint says afterwards, and training does not notice."""

import json
import pathlib

import pytest

from maxtrain import LLM, SamplingParams, train
from maxtrain.config.errors import Refused
from maxtrain.llm import rewind
from maxtrain.serving.questions import evaluate

TINY = str(pathlib.Path(__file__).parent / "tiny.yml")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_samples_and_answers_within_training(trained, tmp_path, cache_dir):
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": "ab", "choices": ["zz", "ab", "q"], "answer": 1}) + "\n")
    words = [f"run.dir={tmp_path / 'run'}", f"data.cache_dir={cache_dir}", "eval.prompts=[copy ab, '']", f"eval.questions.ab={questions}"]
    words += ["serve.max_requests=4", "serve.num_blocks=2", "serve.sampling.max_tokens=8", "mesh.fsdp=8"]
    assert train.main([TINY, *words]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, text) for step in (5, 10, 15, 20) for text in ("copy ab", "")
    ]
    answered = [row for row in rows(tmp_path / "run") if "eval/ab/accuracy" in row]
    assert len(answered) == 4
    for step in (15, 20):
        llm = LLM(tmp_path / "run" / "checkpoints" / str(step), max_requests=4, num_blocks=2)
        outputs = llm.generate(["copy ab", ""], SamplingParams(max_tokens=8, seed=0))
        assert [output.text for output in outputs] == [sample["text"] for sample in samples if sample["step"] == step]
        (row,) = [row for row in answered if row["step"] == step]
        assert {key.removeprefix("eval/ab/"): value for key, value in row.items() if "eval/ab/" in key} == evaluate(llm, str(questions))
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (trained, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # on one device and on eight


def test_samples_of_steps_that_are_computed_again_are_forgotten(tmp_path):
    path = tmp_path / "samples.jsonl"
    rewind(str(path), 10)
    assert not path.exists()
    rows = [{"step": step, "prompt": "a", "text": "b\u2028"} for step in (5, 10, 15, 20)]
    decoded = {"step": 20, "prompt": "a", "text": "b", "finish_reason": "stop"}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows[:3], decoded, rows[3]]]
    path.write_text("".join(lines) + '{"step": 10, "pro')
    rewind(str(path), 10)
    assert path.read_text() == "".join([*lines[:2], lines[3]])
    before = path.stat().st_mtime_ns
    rewind(str(path), 10)
    assert path.stat().st_mtime_ns == before


def test_questions_that_cannot_be_read_are_refused_before_training(tmp_path):
    with pytest.raises(Refused, match=r"nowhere\.jsonl: cannot be read"):
        train.main([TINY, f"run.dir={tmp_path / 'run'}", "eval.questions.a=nowhere.jsonl"])
    with pytest.raises(Refused, match="sets and questions are both called held"):
        train.main([TINY, f"run.dir={tmp_path / 'run'}", "eval.questions.held=nowhere.jsonl"])
    assert not (tmp_path / "run").exists()
