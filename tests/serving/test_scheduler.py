"""Whatever comes, every request is served, in its turn, with its own tokens, and all pages come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtrain.serving.pages import PagePool, root_hash
from maxtrain.serving.scheduler import Limits, Request, Scheduler


def request(name, prompt, max_tokens=3, **options):
    return Request(name, tuple(prompt), None, max_tokens, root_hash(0), arrival=int(name), **options)


def scheduler(pages=20, page_size=4, rows=4, blocks=2, block=4, slots=4, **options):
    return Scheduler(PagePool(pages, page_size), Limits(rows, blocks, block, slots), **options)


def answer(made, plan, token=lambda request: len(request.tokens)):
    """What an engine does with the result of a step."""
    for chunk in plan:
        if chunk.samples:
            chunk.request.pending -= 1
            if chunk.request.finish_reason is None:
                chunk.request.tokens.append(token(chunk.request))
                if len(chunk.request.tokens) - len(chunk.request.prompt) >= chunk.request.max_tokens:
                    chunk.request.finish_reason = "length"
                    made.remove(chunk.request)


def test_a_long_prompt_is_cut_and_decoding_goes_on_beside_it():
    made = scheduler()
    short, long = request("0", range(3), max_tokens=9), request("1", range(100, 115))
    made.add(short)
    answer(made, made.schedule())
    made.add(long)
    plans = []
    for _ in range(3):
        plan = made.schedule()
        plans.append([(chunk.request.id, chunk.start, chunk.count, chunk.in_rows, chunk.samples) for chunk in plan])
        answer(made, plan)
    assert plans[0] == [("0", 3, 1, True, True), ("1", 0, 8, False, False)]
    assert plans[1] == [("0", 4, 1, True, True), ("1", 8, 7, False, True)]
    assert plans[2] == [("0", 5, 1, True, True), ("1", 15, 1, True, True)]


def test_equal_prefixes_share_pages_in_the_same_step_and_later():
    made = scheduler(blocks=8)
    first, second = request("0", range(10)), request("1", [*range(8), 99])
    made.add(first)
    made.add(second)
    plan = made.schedule()
    assert [(chunk.start, chunk.count, chunk.in_rows) for chunk in plan] == [(0, 10, False), (8, 1, True)]
    assert first.pages[:2] == second.pages[:2]
    assert second.cached == 8
    answer(made, plan)
    other = request("2", [*range(8), 99])
    other.root = root_hash(1)  # other weights
    made.add(other)
    made.schedule()
    assert other.cached == 0
    made.check()


def test_the_last_token_is_always_computed():
    made = scheduler(blocks=8)
    for name in "01":
        made.add(request(name, range(8)))
    assert [(chunk.start, chunk.count) for chunk in made.schedule()] == [(0, 8), (4, 4)]


def test_priority_goes_before_arrival_and_takes_slots():
    made = scheduler(slots=1)
    low, high = request("0", range(4), max_tokens=5, priority=1), request("1", range(50, 54), max_tokens=1)
    made.add(low)
    answer(made, made.schedule())
    made.add(high)
    answer(made, made.schedule())
    assert high.finish_reason == "length"
    assert low.preemptions == 1
    assert low.finish_reason is None
    while low.finish_reason is None:
        answer(made, made.schedule())
    assert low.tokens == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_pages_behind_the_window_are_free():
    made = scheduler(pages=8, window=6, blocks=1)
    sole = request("0", range(20), max_tokens=30)
    made.pages_of = lambda tokens, own=made.pages_of: min(own(tokens), 7)  # what an unbounded request would need does not matter here
    made.add(sole)
    del made.pages_of
    while sole.finish_reason is None:
        answer(made, made.schedule())
        made.check()
        assert len([page for page in sole.pages if page]) <= 4
    assert len(sole.tokens) == 50


def test_drafts_take_rows_and_never_pass_the_end():
    made = scheduler(draft=lambda request: [7] * 9)
    sole = request("0", range(3), max_tokens=4, synchronous=True)
    made.add(sole)
    answer(made, made.schedule())
    (chunk,) = made.schedule()
    assert chunk.drafts == (7, 7)  # with the token after them, three are left
    assert made.schedule() == []


REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.integers(0, 3), st.integers(0, 12), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.integers(12, 30), st.booleans(), st.booleans(), st.integers(0, 2), st.sampled_from([None, 5]))
def test_all_are_served_and_all_pages_come_back(described, pages, prefix_cache, exact, depth, window):
    """Random lengths, priorities, shared prefixes and aborts, a pool too small for all, steps read up to two late."""
    made = scheduler(pages=pages, rows=5, blocks=3, slots=5, prefix_cache=prefix_cache, exact=exact, window=window)
    every, aborts, flights, steps = [], {}, [], 0
    for index, (length, new, priority, family, abort, synchronous) in enumerate(described):
        prompt = [family] * (length - 1) + [index]
        every.append(request(str(index), prompt, max_tokens=new, priority=priority, synchronous=synchronous))
        made.add(every[-1])
        if abort > 6:
            aborts[index] = abort
    while made.running or made.waiting or flights:
        steps += 1
        assert steps < 3000, "nothing goes on"
        for index, at in aborts.items():
            if at == steps + 6 and every[index].finish_reason is None:
                every[index].finish_reason = "abort"
                made.remove(every[index])
        plan = made.schedule()
        made.check()
        assert sum(1 for chunk in plan if chunk.in_rows) <= 5
        assert sum(-(-chunk.count // 4) for chunk in plan if not chunk.in_rows) <= 3
        assert len({chunk.request for chunk in plan}) == len(plan)
        if plan:
            flights.append(plan)
        if flights and (not plan or len(flights) > depth):
            answer(made, flights.pop(0))
        made.check()
        assert 0 <= made.waste() < 1
    for each in every:
        assert each.finish_reason in ("length", "abort")
        if each.finish_reason == "length":
            assert each.tokens == [*each.prompt, *range(len(each.prompt), len(each.prompt) + each.max_tokens)]
    assert made.pool.num_held == 0


def test_a_request_that_can_never_be_served_is_an_error():
    with pytest.raises(AssertionError, match="never be served"):
        scheduler(pages=4).add(request("0", range(20)))
