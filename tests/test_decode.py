"""Decoding through the cache gives what the full forward pass would."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain import decode
from maxtrain.config.errors import Refused
from maxtrain.ops.attention import Context
from maxtrain.training.run import open_run


@pytest.fixture(scope="module")
def opened(trained):
    return open_run(str(trained))


def test_greedy_decoding_takes_the_likeliest_token_of_the_full_forward(opened, monkeypatch):
    program, tokenizer, model, _ = opened
    found: list[int] = []
    monkeypatch.setattr(tokenizer, "decode", found.extend)
    decode.generate(program, model, tokenizer, "copy ab", tokens=12, temperature=0, seed=0)
    assert len(found) == 12
    prompt = [tokenizer.bos_id, *tokenizer.encode("copy ab")]
    tokens = jnp.array([[*prompt, *found]])
    context = Context(jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
    logits = jax.jit(lambda model: model.logits(model(tokens, context).hidden))(model)
    likeliest = logits[0, len(prompt) - 1 : -1, : tokenizer.vocab_size].argmax(-1)
    np.testing.assert_array_equal(found, likeliest)


def test_seed_and_temperature_decide_what_is_drawn(opened):
    program, tokenizer, model, _ = opened

    def draw(seed, temperature=1.0):
        return decode.generate(program, model, tokenizer, "", tokens=16, temperature=temperature, seed=seed)

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    assert draw(1, 1e-6) == draw(2, 0)


def test_a_context_that_is_too_long_is_refused(opened):
    program, tokenizer, model, _ = opened
    with pytest.raises(Refused, match=r"a prompt of 61 tokens and 4 new ones exceed model\.max_length=64"):
        decode.generate(program, model, tokenizer, "x" * 60, tokens=4, temperature=0, seed=0)


def test_command_prints_and_keeps_samples(trained, capsys):
    words = [str(trained), "--prompt", "1+1=", "--prompt=", "--tokens", "5", "--temperature=0", "--seed", "3"]
    assert decode.main(words) == 0
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(20, "1+1="), (20, "")]
    assert capsys.readouterr().out == "".join(f"{sample['prompt']}{sample['text']}\n" for sample in samples)


@pytest.mark.parametrize("words", [[], ["--prompt"], ["--prompt", "a", "--tokens", "0"], ["--prompt", "a", "--temperature", "warm"]])
def test_bad_options_are_refused(trained, words):
    with pytest.raises(Refused, match="--"):
        decode.main([str(trained), *words])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match="no run is here"):
        decode.main([str(tmp_path), "--prompt", "a"])
