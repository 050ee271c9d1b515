"""The entry: prompts from everywhere, results as text and JSON lines, questions, and refusals."""

import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from maxtrain import LLM, SamplingParams, decode
from maxtrain.config import cli, schema
from maxtrain.config.errors import Refused
from maxtrain.serving.outputs import Delta, Output
from maxtrain.serving.questions import evaluate, read
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


def test_results_are_printed_before_they_are_written(monkeypatch, capsys):
    output = Output("copy ab", [1], [], None, 0, error="too long")
    monkeypatch.setattr(decode, "generate", lambda llm, prompts, special: [output])
    llm = SimpleNamespace(folder=None, step=None)
    with pytest.raises(OSError, match="No space left"):
        decode._batch(llm, [decode.Asked("copy ab")], cli.open_output("/dev/full", "w"), False)
    assert capsys.readouterr().out == "refused: too long\n"


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
        ('{"prompt": "a", "target": "x", "answer": 0}', "write either choices and answer, or target"),
        ('{"prompt": "a", "target": "x", "target": "y"}', "the key 'target' is there twice"),
        ('{"prompt": "a\\ud800", "target": "x"}', "half of a surrogate pair"),
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


def test_questions_that_cannot_be_asked_count_as_wrong_and_do_not_end_the_evaluation(trained, tmp_path):
    llm = LLM(trained)
    lines = [{"prompt": "a", "choices": ["b" * 70, "b"], "answer": 1}, {"prompt": "ab", "choices": ["b", "c"], "answer": 0}]
    lines += [{"prompt": "ab", "choices": ["b", "c"], "answer": 1}, {"prompt": "x" * 70, "target": "y"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(llm, str(tmp_path / "q.jsonl"))
    assert found == {"accuracy": 1 / 3, "accuracy_norm": 1 / 3, "exact_match": 0.0, "questions": 4, "refused": 2}


def test_a_line_of_a_file_says_what_it_asks_for_and_gets_its_id_back(trained, tmp_path, capsys):
    lines = [
        {"id": "r7", "prompt": "copy ab", "max_tokens": 1},
        {"id": 8, "prompt": "copy ab", "temperature": 0, "stop": "b", "logprobs": 0, "prompt_logprobs": 0},
        {"id": None, "prompt": "copy ab", "n": 2, "seed": 3},
        {"id": [1], "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "x" * 99},
        {"prompt": "half \ud800"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        str(trained),
        "--file",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
        "--tokens=5",
        "serve.sampling.top_k=9",
    ]
    assert decode.main(words) == 2
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("id") for line in found] == ["r7", 8, None, [1], None, None]
    assert [line.get("tokens", 0) <= 5 for line in found] == [True] * 6
    assert found[0]["tokens"] == 1
    assert "b" not in found[1]["text"]
    assert {"logprobs", "prompt_logprobs"} <= set(found[1])
    assert len(found[2]["samples"]) == 2
    assert ["error" in line for line in found] == [False] * 3 + [True] * 3
    assert [line["prompt"] for line in found] == [line.get("prompt", line.get("messages")) for line in lines]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "best_of": 3}', "unknown key best_of"),
        ('{"prompt": "a", "max_tokens": "5"}', r"a\.jsonl:1: max_tokens: Input should be a valid integer"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: Input should be greater than or equal to 1"),
        ('{"prompt": "a", "temperature": 0, "top_k": 3}', "top_k has no effect with temperature=0"),
        ('{"prompt": "a", "messages": []}', "write an object with either prompt"),
        ('{"prompt": null}', "write an object with either prompt"),
        ('{"messages": "hi"}', "messages is a list of objects"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_before_the_model_is_opened(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(Refused, match=message):
        decode.main([str(tmp_path / "no model"), "--file", str(tmp_path / "a.jsonl")])


def test_only_what_is_given_takes_the_place_of_what_the_run_says():
    def overrides(*words):
        return decode._overrides(cli.parse(words, usage="", options=decode.OPTIONS, positional="MODEL", overrides=False, assignments=True))

    assert overrides("m") == []
    assert overrides("m", "--seed", "3", "serve.page_size=4") == ["serve.seed=3", "serve.page_size=4"]
    found = overrides("m", "--temperature=0", "serve.sampling.top_k=3")
    assert found[0] == "serve.sampling.temperature=0.0"
    assert "serve.sampling.top_p=1.0" in found
    assert [word for word in found if "top_k" in word] == ["serve.sampling.top_k=3"]


def test_a_checkpoint_is_only_looked_at(trained, capsys, monkeypatch):
    step = trained / "checkpoints" / "20"
    before = sorted(path.relative_to(step) for path in step.rglob("*"))
    words = [str(step), "--prompt", "copy", "--tokens", "2"]
    assert decode.main(words) == 0
    assert sorted(path.relative_to(step) for path in step.rglob("*")) == before
    assert json.loads((trained / "samples.jsonl").read_text().splitlines()[-1])["step"] == 20
    monkeypatch.setattr(
        cli, "open_output", lambda path, mode: (_ for _ in ()).throw(Refused(f"--out {path}: cannot be written: Read-only"))
    )
    capsys.readouterr()
    assert decode.main(words) == 0  # on a read-only disk it prints
    captured = capsys.readouterr()
    assert captured.out.startswith("copy")
    assert "Read-only" in captured.err
    with pytest.raises(Refused, match="Read-only"):
        decode.main([*words, "--out", "x"])


class Talk:
    """A model that answers in capitals, and refuses what is longer than its context or improper."""

    def stream(self, messages, special=False):
        said = "".join(message["content"] for message in messages)
        if len(said) > 12 or "!" in said:
            raise Refused(f"{len(said)} characters exceed the context")
        yield Delta(messages[-1]["content"].upper(), [0], "stop")


def test_special_tokens_count_where_asked_in_prompts_and_conversations():
    class Model:
        config = schema.Config()

        def generate(self, prompts, params, progress, special):
            return [Output(prompt, [int(special)], [], None, 0) for prompt in prompts]

        chat = generate

    for special in (False, True):
        outputs = decode.generate(Model(), [decode.Asked("a"), decode.Asked([{"role": "user", "content": "b"}])], special)
        assert [output.prompt_token_ids for output in outputs] == [[special], [special]]


def test_a_chat_outlives_what_is_refused(monkeypatch):
    typed, console = iter(["abc", "def", "!", "ghi", "x" * 20, "jkl"]), Console(file=io.StringIO(), width=200)

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    decode.chat(Talk(), console)
    assert console.file.getvalue().splitlines()[1:] == [
        "ABC",
        "DEF",
        "This message is refused, and left out: 1 characters exceed the context",
        "(without the first 2 messages, which no longer fit)",
        "GHI",
        "This message is refused, and left out: 20 characters exceed the context",
        "(without the first 2 messages, which no longer fit)",
        "JKL",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval", "q.jsonl", "--prompt", "x"], "--prompt has no effect with --eval"),
        (["--eval", "q.jsonl", "--special"], "--special has no effect with --eval"),
        (["--eval", "q.jsonl", "--tokens", "3"], "--tokens has no effect with --eval"),
        (["--prompt", "x", "--out", "a", "--out", "b"], "--out is given 2 times"),
        (["--prompt", "x", "--out", "/proc/x"], "--out /proc/x: cannot be written"),
        (["--prompt", "x" * 61, "--tokens", "4"], "a prompt of 62 tokens and max_tokens=4 exceed the context of 64"),
        (["--prompt", "x", "model.embed=3"], "a trained model is served as it is; set serve, mesh, precision"),
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
