"""Texts in and out: from several threads, as a stream, with asyncio, scored; and what the user is told when it goes wrong."""

import asyncio
import gc
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import within
from traffic import traffic

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


def test_special_tokens_that_are_spelled_out_count_where_asked(llm):
    want = llm.generate([[256, *b"a", 257, *b"b"]], GREEDY)[0].token_ids
    assert llm.generate("a<|eos|>b", GREEDY, special=True)[0].token_ids == want
    assert [delta.token_ids[0] for delta in llm.stream("a<|eos|>b", GREEDY, special=True)] == want
    plain = llm.generate("a<|eos|>b", GREEDY)[0]
    assert plain.prompt_token_ids == [256, *b"a<|eos|>b"]
    assert [delta.token_ids[0] for delta in llm.stream("a<|eos|>b", GREEDY)] == plain.token_ids


def test_a_special_token_can_be_a_word_that_never_comes(llm):
    forced = GREEDY.model_copy(update={"logit_bias": {257: 100.0}})
    assert llm.generate("a", forced)[0].completions[0].finish_reason == "stop"
    kept = llm.generate("a", forced.model_copy(update={"bad_words": ("<|eos|>",)}))[0].completions[0]
    assert kept.finish_reason == "length"
    assert 257 not in kept.token_ids


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


def donate_and_fail(llm, monkeypatch, times=1):
    """The next steps are computed, so that the state they began with is gone, and then raise."""
    real, left = llm.engine.programs.step, [times]

    def step(*args):
        state, outputs = real(*args)
        if left[0]:
            left[0] -= 1
            jax.tree.map(lambda x: x.delete(), state)
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return state, outputs

    monkeypatch.setattr(llm.engine.programs, "step", step)


def test_after_a_real_step_that_failed_the_engine_goes_on_without_what_it_had_cached(llm, monkeypatch):
    want = llm.generate("copy ab copy", GREEDY)[0].token_ids
    assert llm.generate("copy ab copy", GREEDY)[0].cached_tokens > 0
    donate_and_fail(llm, monkeypatch)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        within(lambda: llm.generate("copy ab copy", GREEDY))
    (after,) = within(lambda: llm.generate("copy ab copy", GREEDY))
    assert (after.token_ids, after.cached_tokens) == (want, 0)
    donate_and_fail(llm, monkeypatch)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        within(lambda: list(llm.stream("copy ab copy", GREEDY)))
    donate_and_fail(llm, monkeypatch)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        within(lambda: llm.score(["copy"], [" ab"]))
    donate_and_fail(llm, monkeypatch)  # those that wait for a place are not ended by it
    found, threads = [], []
    for index in range(8):
        threads.append(threading.Thread(target=lambda: found.append(ended(llm, GREEDY)), daemon=True, name=str(index)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert 0 < sum(isinstance(item, RuntimeError) for item in found) <= 4
    assert all(item == want for item in found if not isinstance(item, RuntimeError))
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_held == 0


def ended(llm, params):
    try:
        return llm.generate("copy ab copy", params)[0].token_ids
    except RuntimeError as error:
        return error


def test_weights_loaded_during_traffic_lose_no_request(llm):
    assert not llm.engine.programs.on_one_cpu  # so that it serves the weights as they were handed to it
    weights, want = llm.engine.model, llm.generate("copy ab", GREEDY)[0].token_ids
    found, done = [], threading.Event()

    def ask():
        for _ in range(10):
            found.append(llm.generate("copy ab", GREEDY)[0].token_ids)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not done.wait(0.01):
        within(lambda: llm.load(weights))
    assert found == [want] * 40


def test_a_forgotten_stream_and_a_closed_event_loop_end_their_own_request_alone(llm, caplog):
    endless = SamplingParams(max_tokens=50, ignore_eos=True)
    stream = llm.stream("copy", endless)
    next(stream)
    circle = [stream]
    circle.append(circle)
    del stream, circle
    within(lambda: llm.driver.do(gc.collect))

    async def leaves():
        async for _ in llm.astream("copy", endless):
            return

    loop = asyncio.new_event_loop()
    task = loop.create_task(leaves())
    loop.run_until_complete(asyncio.sleep(0.05))
    task.cancel()
    asyncio.set_event_loop(None)
    loop.close()  # while its request runs
    del task
    assert within(lambda: llm.generate("copy ab", GREEDY))[0].error is None
    assert within(lambda: llm.driver.do(lambda: llm.engine.scheduler.pool.num_held)) == 0


@pytest.mark.slow
def test_traffic(llm):
    counts = traffic(llm, llm.engine.model, seconds=20, seed=0)
    assert set(counts) == {"generate", "stream", "leave", "score", "load"}


def test_whoever_the_engine_calls_is_refused_to_wait_for_it(llm):
    for ask in (lambda: llm.generate("x"), lambda: llm.score(["x"], ["y"]), lambda: next(llm.stream("x"))):
        with pytest.raises(Refused, match="cannot wait for it"):
            within(lambda ask=ask: llm.driver.do(ask))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1.5], "1.5 at index 0"),
        ([True, 2], "True at index 0"),
        ([1, None], "None at index 1"),
        ([[1]], r"\[1\] at index 0"),
        (5, "not 5"),
        (None, "not None"),
        ("a\ud800", "character 1 is"),
        ([-1], "the token -1"),
        ({"role": "user"}, "not {'role'"),
    ],
)
def test_a_prompt_of_a_wrong_form_fails_alone(llm, prompt, message):
    bad, good = within(lambda: llm.generate([prompt, "copy ab"], GREEDY))
    assert re.search(message, bad.error)
    assert good.error is None
    refused, scored = llm.score([prompt, "copy"], [[66] if not isinstance(prompt, str) else "x", " ab"])
    assert re.search(message, refused.error)
    assert scored.error is None


def test_arrays_of_integers_are_prompts(llm):
    want = llm.generate([[65, 66]], GREEDY)[0].token_ids
    for given in (np.array([65, 66]), jnp.array([65, 66]), [np.array([65, 66], np.uint16)], np.array([[65, 66]])):
        assert [output.token_ids for output in llm.generate(given, GREEDY)] == [want]
    assert [delta.token_ids[0] for delta in llm.stream(np.array([65, 66]), GREEDY)] == want


def test_a_request_is_taken_up_whole_or_not_at_all(llm, monkeypatch):
    asked = llm.engine.stats.generated
    bad = [SamplingParams(max_tokens=3), {"max_tokens": 3}, None, SamplingParams(logit_bias={999: 1.0}, n=3, max_tokens=3)]
    outputs = within(lambda: llm.generate(["a"] * 4, bad))
    assert [output.error is None for output in outputs] == [True, False, False, False]
    assert "the token 999" in outputs[3].error
    for priority in ("high", 1.5, None):
        assert "write an integer" in within(lambda priority=priority: llm.generate("a", GREEDY, priority=priority))[0].error
    with pytest.raises(Refused, match="params is one SamplingParams"):
        llm.generate("a", {"max_tokens": 3})
    with pytest.raises(Refused, match="2 continuations are given for 1 prompts"):
        llm.score(["a"], ["b", "c"])
    prepare, calls = llm.engine.prepare, []

    def second_fails(**wanted):
        calls.append(wanted)
        if len(calls) == 2:
            raise TypeError("from a tokenizer")
        return prepare(**wanted)

    monkeypatch.setattr(llm.engine, "prepare", second_fails)
    (output,) = within(lambda: llm.generate("a", SamplingParams(n=3, max_tokens=3)))
    assert output.error == "the prompt cannot be read: TypeError: from a tokenizer"
    assert not llm.engine.busy
    assert llm.engine.stats.generated - asked <= 3


def test_an_output_that_cannot_be_decoded_fails_alone(llm, monkeypatch):
    decode = llm.tokenizer.decode

    def fails(ids):
        if 66 in ids:
            raise ValueError("no such token")
        return decode(ids)

    monkeypatch.setattr(llm.tokenizer, "decode", fails)
    params = [SamplingParams(temperature=0.0, max_tokens=4, allowed_token_ids=[token]) for token in (66, 67)]
    bad, good = within(lambda: llm.generate(["x", "x"], params))
    assert bad.error == "the tokenizer cannot decode the output: ValueError: no such token"
    assert good.text == "CCCC"


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
    stream = TextStream(Bytes(), prompt="é".encode()[:1])  # the prompt ends within a character: its text is not the stream's
    stream.push(ord("a"))
    assert stream.text == "a"
    stream = TextStream(Bytes())
    stream.push("é".encode()[0])
    stream.finish()
    assert stream.text == "\ufffd"


class Stripped:
    """A token is a word with its blank; the first word of a text loses it, as SentencePiece has it."""

    def decode(self, ids):
        return "".join(f" {chr(token)}" for token in ids)[1:]


def test_the_first_word_keeps_its_blank():
    stream, alone = TextStream(Stripped(), stops=[" c"], prompt=[97]), TextStream(Stripped())
    for token in (98, 99):
        stream.push(token)
        alone.push(token)
    assert (stream.text, stream.stop) == (" b", " c")
    assert alone.text == "b c"
