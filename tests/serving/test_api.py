"""Texts in and out: from several threads, as a stream, with asyncio, scored; and what the user is told when it goes wrong."""

import asyncio
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import maxtrain
from maxtrain import LLM, SamplingParams
from maxtrain.config.errors import Refused
from maxtrain.serving.text import TextStream
from maxtrain.training.pretrained import load_pretrained

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(trained):
    return LLM(trained, max_requests=4, num_blocks=2)


def test_outputs_have_the_order_of_the_prompts_and_errors_stay_with_theirs(llm):
    prompts = ["copy ab", "", "x" * 70, [65, 66, 67], [999]]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    assert [output.error is None for output in outputs] == [True, True, False, True, False]
    with pytest.raises(Refused, match="71 tokens and max_tokens=12 exceed the context of 64"):
        _ = outputs[2].text
    for output in outputs:
        if output.error is None:
            assert output.token_ids == llm.generate([output.prompt_token_ids], GREEDY)[0].token_ids
            assert output.completions[0].times == sorted(output.completions[0].times)


def test_samples_and_their_seeds(llm):
    (output,) = llm.generate("copy", SamplingParams(n=3, seed=5, max_tokens=8, logprobs=2))
    singles = [llm.generate("copy", SamplingParams(seed=5 + index, max_tokens=8))[0].token_ids for index in range(3)]
    assert [sample.token_ids for sample in output.completions] == singles
    for sample in output.completions:
        for token, likeliest in zip(sample.token_ids, sample.logprobs, strict=True):
            assert token in likeliest
            assert 2 <= len(likeliest) <= 3


def test_a_stop_text_ends_the_output_and_is_not_in_it(llm):
    whole = llm.generate("copy ab", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))[0].text
    stop = whole[5:7]
    cut = llm.generate("copy ab", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop))[0].completions[0]
    assert (cut.text, cut.finish_reason, cut.stop) == (whole[: whole.index(stop)], "stop", stop)
    kept = llm.generate("copy ab", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop, include_stop=True))[0].text
    assert kept == cut.text + stop


def test_bad_words_never_come(llm):
    free = llm.generate("copy ab", GREEDY)[0].text
    for word in (free[1:2], free[2:4]):
        held = llm.generate("copy ab", SamplingParams(temperature=0.0, max_tokens=12, bad_words=[word]))[0].text
        assert word in free
        assert word not in held


def test_prompt_logprobs_are_those_of_the_forward(llm, trained):
    (output,) = llm.generate("copy ab", SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1))
    logits = np.asarray(load_pretrained(trained)([output.prompt_token_ids])[0], np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert output.prompt_logprobs[0] is None
    for place, found in enumerate(output.prompt_logprobs[1:]):
        token = output.prompt_token_ids[place + 1]
        assert found[token] == pytest.approx(want[place, token], abs=1e-4)


def test_streams_give_what_waiting_gives(llm):
    asked = SamplingParams(temperature=0.0, max_tokens=20, stop=["zzz", "ab"], ignore_eos=True)
    want = llm.generate("copy ", asked)[0].completions[0]
    deltas = list(llm.stream("copy ", asked))
    assert "".join(delta.text for delta in deltas) == want.text
    assert [token for delta in deltas for token in delta.token_ids] == want.token_ids
    assert deltas[-1].finish_reason == want.finish_reason

    async def several():
        async def one():
            return [delta async for delta in llm.astream("copy ", asked)]

        return await asyncio.gather(*[one() for _ in range(6)])

    for found in asyncio.run(several()):
        assert "".join(delta.text for delta in found) == want.text


def test_a_stream_that_is_closed_ends_its_request(llm):
    stream = llm.stream("copy", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.generate("x", GREEDY)[0].error is None
    assert llm.engine.scheduler.pool.num_held == 0


def test_threads_share_the_engine(llm):
    want, found = llm.generate("copy ab", GREEDY)[0].text, []
    threads = [threading.Thread(target=lambda: found.append(llm.generate("copy ab", GREEDY)[0].text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 8


def test_scores_are_the_cross_entropy_of_the_training_forward(llm, trained):
    model = load_pretrained(trained)
    pairs = [("copy", " ab"), ("copy ", "ab"), ("", "copy"), ("1+1=", "2"), ("x" * 80, "end"), ("copy", " ab")]
    scores = llm.score([prompt for prompt, _ in pairs], [rest for _, rest in pairs])
    for (prompt, rest), score in zip(pairs, scores, strict=True):
        tokens = [model.tokenizer.bos_id, *map(int, model.tokenizer.encode(prompt + rest))][-64:]
        logits = np.asarray(model(jnp.array([tokens]))[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        count = len(score.token_logprobs)
        want = [logprobs[place - 1, tokens[place]] for place in range(len(tokens) - count, len(tokens))]
        np.testing.assert_allclose(score.token_logprobs, want, atol=1e-4)
        assert score.logprob == pytest.approx(sum(want), abs=1e-4)
        assert count == len(model.tokenizer.encode(rest)) + prompt.endswith(" ")
    assert scores[0] == scores[5]
    likeliest = llm.generate("copy", SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))[0]
    assert llm.score([likeliest.prompt_token_ids], [likeliest.token_ids])[0].is_greedy
    refused = llm.score(["a", [1], "b"], ["", "x", "c" * 70])
    assert [bool(score.error) for score in refused] == [True, True, True]


def test_what_breaks_the_engine_reaches_whoever_waits(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.programs, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("x", GREEDY)
    monkeypatch.undo()
    assert llm.generate("x", GREEDY)[0].error is None


def test_refusals(llm, trained):
    with pytest.raises(Refused, match="n=2: a stream is of one sample"):
        next(llm.stream("x", SamplingParams(n=2)))
    with pytest.raises(Refused, match="2 sampling parameters are given for 1 prompts"):
        llm.generate(["x"], [GREEDY, GREEDY])
    with pytest.raises(Refused, match=r"serve\.max_request: Extra inputs"):
        LLM(trained, max_request=3)
    assert "no chat template" in llm.chat([{"role": "user", "content": "x"}])[0].error
    assert maxtrain.SamplingParams is SamplingParams


# ----------------------------------------------------------------------------------------------------------- text


class Bytes:
    """A token is a byte."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_half_characters_wait_and_a_beginning_of_a_stop_is_held_back():
    stream, seen = TextStream(Bytes(), stops=["END"]), []
    for byte in "aé€E!EN".encode():
        stream.push(byte)
        seen.append(stream.text[: stream.safe])
    assert seen == ["a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€E!", "aé€E!", "aé€E!"]
    stream.push(ord("D"))
    assert (stream.text, stream.stop) == ("aé€E!", "END")
    stream = TextStream(Bytes())
    stream.push("é".encode()[0])
    stream.finish()
    assert stream.text == "\ufffd"
