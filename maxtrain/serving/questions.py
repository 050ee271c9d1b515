"""Sets of questions with known answers: multiple choice by likelihood, and exact match of what is generated."""

import json
from collections.abc import Mapping
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.serving.api import LLM


def read(path: str) -> list[dict[str, Any]]:
    """The questions of a file of JSON lines: `prompt` with `choices` and `answer` (an index), or with `target`.

    Raises:
        Refused: the file cannot be read, or a line is no such question; with the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read: {error}") from error
    questions = []
    for number, line in lines:
        try:
            item = json.loads(line)
        except ValueError as error:
            raise Refused(f"{path}:{number}: not JSON ({error})") from error
        problem = _problem(item)
        if problem:
            raise Refused(f"{path}:{number}: {problem}")
        questions.append(item)
    if not questions:
        raise Refused(f"{path}: no question is in it")
    return questions


def _problem(item: Any) -> str | None:
    """What is wrong with a question, if anything."""
    if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
        return "prompt is missing: a question is an object with a text as prompt"
    kinds = {"choices", "target"} & set(item)
    if len(kinds) != 1:
        return "write either choices and answer, or target"
    if set(item) - {"prompt", "choices", "answer", "target"}:
        return f"unknown key {min(set(item) - {'prompt', 'choices', 'answer', 'target'})}; allowed are prompt, choices, answer, target"
    if "target" in item:
        return None if isinstance(item["target"], str) and item["target"] else "target must be a text that is not empty"
    choices = item["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        return "choices must be at least two texts that are not empty"
    answer = item.get("answer")
    return None if type(answer) is int and 0 <= answer < len(choices) else f"answer must be an index from 0 to {len(choices) - 1}"


def evaluate(llm: LLM, path: str, *, max_tokens: int = 64) -> dict[str, float]:
    """Accuracy on a file of questions.

    Returns: for multiple choice `accuracy` by summed log-probability and `accuracy_norm` by log-probability per byte of the choice
    (as lm-evaluation-harness has them), for targets `exact_match` of the likeliest continuation's first line; and `questions`.

    Raises:
        Refused: see `read`; or a question does not fit into the context.
    """
    questions, result = read(path), dict[str, float]()
    if llm.tokenizer is None:
        raise Refused(f"{path}: questions are texts, but the model has no tokenizer")
    chosen = [item for item in questions if "choices" in item]
    if chosen:
        pairs = [(item["prompt"], choice) for item in chosen for choice in item["choices"]]
        scores = llm.score([prompt for prompt, _ in pairs], [choice for _, choice in pairs])
        for score in scores:
            if score.error is not None:
                raise Refused(f"{path}: {score.error}")
        found = iter(scores)
        right = right_norm = 0
        for item in chosen:
            sums = [next(found).logprob for _ in item["choices"]]
            norms = [value / len(choice.encode()) for value, choice in zip(sums, item["choices"], strict=True)]
            right += sums.index(max(sums)) == item["answer"]
            right_norm += norms.index(max(norms)) == item["answer"]
        result |= {"accuracy": right / len(chosen), "accuracy_norm": right_norm / len(chosen)}
    asked = [item for item in questions if "target" in item]
    if asked:
        prompts = [llm.tokenizer.encode_prompt(item["prompt"]) for item in asked]
        room = [max(1, min(max_tokens, llm.engine.max_length - len(prompt))) for prompt in prompts]
        outputs = llm.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=most, stop=("\n",)) for most in room])
        matches = [output.text.strip() == item["target"].strip() for output, item in zip(outputs, asked, strict=True)]
        result["exact_match"] = sum(matches) / len(asked)
    return result | {"questions": len(questions)}
