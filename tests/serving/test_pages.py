"""The page pool keeps count, and finds the prefixes it should and no others."""

from hypothesis import given, settings
from hypothesis import strategies as st

from maxtrain.serving.pages import PagePool, next_hash, root_hash


def test_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning():
    pool = PagePool(6, 2)
    a, b = pool.take(2), pool.take(2)
    for pages, start in ((a, b"a"), (b, b"b")):
        for index, page in enumerate(pages):
            pool.name(page, start + bytes([index]))
    pool.release(a)
    pool.release(b)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (5, 4, 0)
    assert pool.take(2)[1] == a[1]  # after the page that nothing is known of
    assert pool.find([b"a\0", b"a\1"]) == a[:1]
    assert pool.find([b"b\0", b"b\1"]) == b
    pool.hold(b)
    assert pool.take(2) is None
    pool.forget_all()
    assert pool.find([b"b\0"]) == []
    pool.check()


def test_chains_of_other_roots_or_prefixes_never_meet():
    names = {
        next_hash(root_hash(version, salt), tokens) for version in (0, 1) for salt in ("", "x") for tokens in ((1, 2), (1, 3), (1, 2, 0))
    }
    assert len(names) == 12
    assert next_hash(next_hash(root_hash(0), (1,)), (2,)) != next_hash(next_hash(root_hash(0), (2,)), (2,))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release", "name", "forget"]), st.integers(0, 7)), max_size=60))
def test_free_and_held_are_all(operations):
    pool, owned = PagePool(9, 4), []
    for operation, number in operations:
        if operation == "take":
            pages = pool.take(number)
            owned += [pages] if pages else []
        elif operation == "hold":
            found = pool.find([bytes([number])])
            pool.hold(found)
            owned += [found] if found else []
        elif operation == "release" and owned:
            pool.release(owned.pop(number % len(owned)))
        elif operation == "name" and owned:
            pool.name(owned[-1][0], bytes([number]))
        elif operation == "forget":
            pool.forget_all()
        pool.check()
        assert pool.num_free + pool.num_held == 8
        assert pool.num_cached <= pool.num_free
        assert pool.num_held == len({page for pages in owned for page in pages})
