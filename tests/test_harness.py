"""A likelihood task and a generation task of lm-evaluation-harness, from local files, agree with the engine asked directly."""

import importlib.util
import json

import pytest

from maxtrain import LLM, SamplingParams, harness
from maxtrain.config.errors import Refused

pytestmark = pytest.mark.slow
ITEMS = [
    {"text": "copy ab", "choices": [" ab", " zz", " q"], "gold": 0, "answer": "ab"},
    {"text": "1+1=", "choices": ["2", "3", "9"], "gold": 2, "answer": "2"},
    {"text": "copy q", "choices": ["x", "q", "a b"], "gold": 1, "answer": "q"},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "b"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra [eval]")
def test_local_tasks(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, text in (("choice", CHOICE), ("words", WORDS), ("rolling", ROLLING)):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    words = ["--tasks", "local_choice,local_words,local_rolling", "--include", str(tmp_path / "tasks"), "--out", str(tmp_path / "out.json")]
    assert harness.main([str(trained), *words, "serve.max_requests=4"]) == 0
    assert "local_choice" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    llm = LLM(trained, max_requests=4)
    sums = [[llm.score([item["text"]], [choice])[0].logprob for choice in item["choices"]] for item in ITEMS]
    right = [row.index(max(row)) == item["gold"] for row, item in zip(sums, ITEMS, strict=True)]
    assert found["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    asked = SamplingParams(temperature=0.0, max_tokens=8, stop=["\n", "b"])
    texts = [llm.generate(item["text"], asked)[0].text for item in ITEMS]
    assert found["local_words"]["exact_match,none"] == pytest.approx(
        sum(text == item["answer"] for text, item in zip(texts, ITEMS, strict=True)) / 3
    )
    total = sum(llm.score([""], [item["text"]])[0].logprob for item in ITEMS)
    size = sum(len(item["text"]) for item in ITEMS)
    assert found["local_rolling"]["byte_perplexity,none"] == pytest.approx(2.718281828459045 ** (-total / size), rel=1e-4)


def test_no_tasks_are_refused(trained):
    with pytest.raises(Refused, match="no --tasks are given"):
        harness.main([str(trained)])
