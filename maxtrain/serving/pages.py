"""The pool of cache pages, as integers: who holds which, which hold a known prefix, and which are free.

A page that is full of known tokens is named by the hash of all tokens up to its end, so equal prefixes find each other. Pages
that nobody holds stay findable until they are needed: the least recently used go first. Page 0 is nobody's.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def root_hash(*parts: object) -> bytes:
    """The start of a chain: weights version, adapter, tenant. Chains with different starts never meet."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a page that holds `tokens` after the pages that `parent` names."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 1 to num_pages - 1. Every one is either held (with a count of holders), or free; a free one may be findable."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages > 1, num_pages
        self.num_pages, self.page_size = num_pages, page_size
        self._holders = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(1, num_pages))  # first to be taken first
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, findable ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but that can be found by their prefix."""
        return sum(page in self._free for page in self._names)

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - len(self._free)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix; they are not held yet."""
        found = []
        for name in names:
            page = self._by_name.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of `pages`, which are held or findable."""
        for page in pages:
            if self._holders[page] == 0:
                del self._free[page]
            self._holders[page] += 1

    def take(self, count: int) -> list[int] | None:
        """`count` free pages, held by the caller; None if there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget(page)
            self._holders[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of a request's pages; its last ones are forgotten first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is released, but nobody holds it"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._names:
                    self._free.move_to_end(page, last=False)

    def name(self, page: int, name: bytes) -> None:
        """Make a held page findable; the first page of a name keeps it."""
        assert self._holders[page] > 0, f"page {page} is named, but nobody holds it"
        if name not in self._by_name and page not in self._names:
            self._by_name[name], self._names[page] = page, name

    def forget_all(self) -> None:
        """No page can be found any more."""
        for page in list(self._names):
            self._forget(page)

    def _forget(self, page: int) -> None:
        name = self._names.pop(page, None)
        if name is not None:
            del self._by_name[name]

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def check(self) -> None:
        """Assert that every page is where it should be."""
        held = [page for page, count in enumerate(self._holders) if count]
        assert not set(held) & set(self._free)
        assert len(held) + len(self._free) == self.num_pages - 1
        assert 0 not in self._free
        assert self._holders[0] == 0
        assert min(self._holders) >= 0
        assert self._by_name == {name: page for page, name in self._names.items()}
