"""The long tier: every family's miniature, imported from Hugging Face's format, is served as its training forward says."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

import maxtrain
from maxtrain import LLM, SamplingParams

pytestmark = pytest.mark.slow
PATH = pathlib.Path(__file__).parents[1] / "models" / "test_families.py"
sys.path.insert(0, str(PATH.parent))  # where its own helpers are
SPEC = importlib.util.spec_from_file_location("family_cases", PATH)
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)


@pytest.mark.parametrize("family", families.CASES)
def test_tokens_and_scores(family, tmp_path):
    """Greedy tokens after prompts longer than the window, and scores to 1e-4, in one batch."""
    families.save(family, list(families.CASES[family])[-1], tmp_path)
    model = maxtrain.load(tmp_path)
    vocab, length = model.config.model.vocab_size, min(model.config.model.max_length, 96)
    llm = LLM(tmp_path, max_requests=4, num_blocks=3, max_length=length)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, size).tolist() for size in (1, 17, length - 40, length - 15)]
    asked = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    rests = [rng.integers(0, vocab, 9).tolist() for _ in prompts]
    outputs, scores = llm.generate(prompts, asked), llm.score(prompts, rests)
    for prompt, rest, output, score in zip(prompts, rests, outputs, scores, strict=True):
        tokens = [*prompt, *output.token_ids]
        logits = np.asarray(model([[*tokens, *[0] * (length - len(tokens))]])[0], np.float64)
        assert output.token_ids == logits[len(prompt) - 1 : len(tokens) - 1, :vocab].argmax(-1).tolist()
        tokens = [*prompt, *rest]
        logits = np.asarray(model([[*tokens, *[0] * (length - len(tokens))]])[0], np.float64)
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        want = [logprobs[place - 1, tokens[place]] for place in range(len(prompt), len(tokens))]
        np.testing.assert_allclose(score.token_logprobs, want, atol=1e-4, rtol=1e-4)
