"""Traffic of all kinds on one engine, with weights loaded and steps that fail in between."""

import random
import threading
import time


def traffic(llm, weights, seconds, seed, threads=4, patience=60):
    """How many requests of each kind were answered as they are alone; raises for one that was not, or that waits for ever.

    Args:
        llm: whose own outputs, asked one by one beforehand, are the right ones.
        weights: its own, which are loaded again and again.
        seconds: how long requests arrive.
        seed: of all choices.
        threads: that ask at the same time.
        patience: seconds after which a request counts as lost.
    """
    from maxtrain import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    prompts = [f"copy {word}" for word in ("ab", "xy", "a b c", "0123")]
    want = {prompt: llm.generate(prompt, greedy)[0].token_ids for prompt in prompts}
    scores = {prompt: llm.score([prompt], [" end"])[0].logprob for prompt in prompts}
    stop, faults, counts = time.monotonic() + seconds, [], {}

    def generate(rng):
        chosen = rng.choices([*prompts, [1.5], "\ud800", None], k=3)
        for prompt, output in zip(chosen, llm.generate([*chosen, "x"], greedy), strict=False):
            assert (output.error is not None) if prompt not in prompts else output.token_ids == want[prompt]

    def stream(rng):
        prompt = rng.choice(prompts)
        assert [token for delta in llm.stream(prompt, greedy) for token in delta.token_ids] == want[prompt]

    def leave(rng):
        circle = [llm.stream(rng.choice(prompts), greedy)]
        next(circle[0])
        circle.append(circle if rng.random() < 0.5 else None)  # found by a garbage collection, or closed at once

    def score(rng):
        prompt = rng.choice(prompts)
        assert abs(llm.score([prompt], [" end"])[0].logprob - scores[prompt]) < 1e-3

    def load(rng):
        llm.load(weights)

    def ask(number):
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < stop and not faults:
            action = rng.choices((generate, stream, leave, score, load), weights=(4, 3, 2, 2, 1))[0]
            try:
                action(rng)
            except BaseException as error:
                faults.append(error)
            counts[action.__name__] = counts.get(action.__name__, 0) + 1

    running = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(max(0, stop - time.monotonic()) + patience)
        assert not thread.is_alive(), "a request waits for ever"
    if faults:
        raise faults[0]
    assert llm.driver.do(lambda: llm.engine.scheduler.check()) is None
    for _ in range(100):
        if not llm.driver.do(lambda: llm.engine.scheduler.pool.num_held):
            return counts
        time.sleep(0.1)
    raise AssertionError("pages are held for nobody")
