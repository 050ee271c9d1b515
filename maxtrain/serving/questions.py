"""Sets of questions with known answers: multiple choice by likelihood, and exact match of what is generated."""

from collections.abc import Mapping
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.serving import lines, prompts
from maxtrain.serving.api import LLM


def read(path: str) -> list[dict[str, Any]]:
    """The questions of a file of JSON lines: `prompt` with `choices` and `answer` (an index), or with `target`.

    Raises:
        Refused: the file cannot be read, or a line is no such question; with the line.
    """
    questions = []
    for number, item in lines.objects(path, ("prompt", "choices", "answer", "target")):
        problem = _problem(item)
        if problem:
            raise Refused(f"{path}:{number}: {problem}")
        questions.append(item)
    if not questions:
        raise Refused(f"{path}: no question is in it")
    return questions


def _problem(item: Mapping[str, Any]) -> str | None:
    """What is wrong with a question, if anything."""
    if not isinstance(item.get("prompt"), str):
        return "prompt is missing: a question is an object with a text as prompt"
    if len({"choices", "target"} & set(item)) != 1 or {"target", "answer"} <= set(item):
        return "write either choices and answer, or target"
    choices = [item["target"]] if "target" in item else item["choices"]
    try:
        for text in (item["prompt"], *(choices if isinstance(choices, list) else ())):
            prompts.text(text) if isinstance(text, str) else None
    except Refused as refusal:
        return str(refusal)
    if "target" in item:
        return None if isinstance(item["target"], str) and item["target"] else "target must be a text that is not empty"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        return "choices must be at least two texts that are not empty"
    answer = item.get("answer")
    return None if type(answer) is int and 0 <= answer < len(choices) else f"answer must be an index from 0 to {len(choices) - 1}"


def evaluate(llm: LLM, path: str, *, max_tokens: int = 64) -> dict[str, float]:
    """Accuracy on a file of questions.

    Returns: for multiple choice `accuracy` by summed log-probability and `accuracy_norm` by log-probability per byte of the choice
    (as lm-evaluation-harness has them), for targets `exact_match` of the likeliest continuation's first line; and `questions`.
    Questions that cannot be asked, such as those longer than the context, count as answered wrongly, and as `refused`.

    Raises:
        Refused: see `read`; or the model has no tokenizer.
    """
    questions, result = read(path), dict[str, float]()
    if llm.tokenizer is None:
        raise Refused(f"{path}: questions are texts, but the model has no tokenizer")
    refused = 0
    chosen = [item for item in questions if "choices" in item]
    if chosen:
        pairs = [(item["prompt"], choice) for item in chosen for choice in item["choices"]]
        found = iter(llm.score([prompt for prompt, _ in pairs], [choice for _, choice in pairs]))
        right = right_norm = 0
        for item in chosen:
            scores = [next(found) for _ in item["choices"]]
            if any(score.error is not None for score in scores):
                refused += 1
                continue
            sums = [score.logprob for score in scores]
            norms = [value / len(choice.encode()) for value, choice in zip(sums, item["choices"], strict=True)]
            right += sums.index(max(sums)) == item["answer"]
            right_norm += norms.index(max(norms)) == item["answer"]
        result |= {"accuracy": right / len(chosen), "accuracy_norm": right_norm / len(chosen)}
    asked = [item for item in questions if "target" in item]
    if asked:
        texts = [llm.tokenizer.encode_prompt(item["prompt"]) for item in asked]
        room = [max(1, min(max_tokens, llm.engine.max_length - len(text))) for text in texts]
        outputs = llm.generate(texts, [SamplingParams(temperature=0.0, max_tokens=most, stop=("\n",)) for most in room])
        answers = [None if output.error is not None else output.text.strip() for output in outputs]
        refused += answers.count(None)
        result["exact_match"] = sum(answer == item["target"].strip() for answer, item in zip(answers, asked, strict=True)) / len(asked)
    return result | {"questions": len(questions)} | ({"refused": refused} if refused else {})
