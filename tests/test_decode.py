"""The entry: prompts from everywhere, results as text and JSON lines, questions, and refusals."""

import io
import json
import re

import pytest

from maxtrain import LLM, SamplingParams, decode
from maxtrain.config.errors import Refused
from maxtrain.serving.questions import read
from maxtrain.training.pretrained import load_pretrained


def test_greedy_text_is_that_of_the_training_forward(trained, capsys):
    assert decode.main([str(trained), "--prompt", "copy ab", "--tokens", "12", "--temperature", "0"]) == 0
    model = load_pretrained(trained)
    tokens = [model.tokenizer.bos_id, *model.tokenizer.encode("copy ab")]
    for _ in range(12):
        tokens.append(int(model([tokens])[0, -1, : model.tokenizer.vocab_size].argmax()))
        if tokens[-1] == model.tokenizer.eos_id:
            break
    assert capsys.readouterr().out == model.tokenizer.decode(tokens) + "\n"


def test_command_prints_and_keeps_samples(trained, capsys):
    before = (trained / "samples.jsonl").read_text().splitlines() if (trained / "samples.jsonl").exists() else []
    words = [str(trained), "--prompt", "1+1=", "--prompt=", "--tokens", "5", "--temperature=0.9", "--seed", "3", "serve.sampling.top_k=40"]
    assert decode.main(words) == 0
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()][len(before) :]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(20, "1+1="), (20, "")]
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{sample['prompt']}{sample['text']}\n" for sample in samples)
    assert "time to first token" in captured.err
    assert decode.main(words) == 0
    assert [json.loads(line)["text"] for line in (trained / "samples.jsonl").read_text().splitlines()][-2:] == [s["text"] for s in samples]


def test_prompts_from_files_and_standard_input(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "three"}\n{"prompt": [65, 66]}\n{"prompt": []}\n')
    words = [str(trained), "--tokens=3", "--out", str(tmp_path / "out.jsonl")]
    assert decode.main([*words, "--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.jsonl")]) == 2  # one is refused
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two", "three", [65, 66], []]
    assert [line.get("prompt_tokens") for line in lines] == [4, 4, 6, 2, None]
    assert "the prompt is empty" in lines[-1]["error"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from here\n"))
    assert decode.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("from here")


def test_questions(trained, tmp_path, capsys):
    llm = LLM(trained)
    continuation = llm.generate("copy ab", decode_params(6)).pop().text
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"prompt": "copy ab", "choices": ["zzzzzz", continuation], "answer": 1})
        + "\n"
        + json.dumps({"prompt": "copy ab", "choices": ["zzzzzz", continuation], "answer": 0})
        + "\n"
        + json.dumps({"prompt": "copy ab", "target": llm.generate("copy ab", decode_params(64, stop="\n"))[0].text.strip() or "?"})
        + "\n"
    )
    assert decode.main([str(trained), "--eval", str(tmp_path / "q.jsonl"), "serve.max_length=64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == found["accuracy_norm"] == 0.5
    assert found["questions"] == 3


def decode_params(tokens, **asked):
    return SamplingParams(temperature=0.0, max_tokens=min(tokens, 40), **asked)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"q\.jsonl:1: not JSON"),
        ('{"prompt": "a"}', "write either choices and answer, or target"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}', "at least two texts"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "an index from 0 to 1"),
        ('{"prompt": "a", "target": "x", "hint": 1}', "unknown key hint"),
        ("", "no question is in it"),
    ],
)
def test_bad_questions_are_refused_by_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(Refused, match=message):
        read(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "x" * 61, "--tokens", "4"], "a prompt of 62 tokens and max_tokens=4 exceed the context of 64"),
        (["--prompt", "x", "model.embed=3"], "only serve, mesh and precision can be set"),
        (["--prompt", "x", "mesh.stage=2"], "mesh.stage=2: serving has no pipeline"),
        (["--prompt", "x", "serve.page=3"], "unknown key serve.page"),
        (["--prompt", "x", "--tokens=3", "serve.sampling.max_tokens=4"], "set twice"),
        (["--prompt", "x", "serve.max_length=65"], "serve.max_length=65 is longer than model.max_length=64"),
        (["--prompt", "x", "serve.memory_gib=1e-6"], "serve.memory_gib=1e-06 holds"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_refusals(trained, words, message, capsys):
    try:
        assert decode.main([str(trained), *words]) == 2
        said = capsys.readouterr().out
    except Refused as refusal:
        said = str(refusal)
    assert re.search(message, said)
