"""Pages of compressed rows: who has them, and which prefixes they hold. Pure bookkeeping.

A page has the rows of every layer for the same tokens. What a sequence needs beside its pages to
go on behind a prefix (the window's rows, the group before) is a snapshot, taken at the end of a
page; pages without one are of no use to others, but may lead to one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prefix:
    """What is cached of a sequence's beginning: whole pages, and the snapshot at their end.

    `n_known` pages, as many or more, hold its beginning; behind the last of `pages` there is no
    snapshot to go on from.
    """

    pages: list[int]
    snapshot: int | None
    n_known: int


def extend_digests(digests: list[bytes], tokens: Sequence[int], page_tokens: int, end: int) -> None:
    """Add the digests of the whole pages of the first `end` tokens that are not there yet.

    Each covers everything up to the end of its page, so that equal digests mean equal prefixes:
    nobody is ever given rows of other tokens.
    """
    for first in range(len(digests) * page_tokens, end - page_tokens + 1, page_tokens):
        page = array("q", tokens[first : first + page_tokens]).tobytes()
        digests.append(hashlib.sha256((digests[-1] if digests else b"") + page).digest())


class PagePool:
    """The pages and snapshots of one DP group.

    Pages count their users. A page that nobody uses any more keeps what it holds, and is taken
    again when no other is free, the one unused for longest first.
    """

    def __init__(self, n_pages: int, page_tokens: int, n_snapshots: int) -> None:
        self.n_pages, self.page_tokens, self.n_snapshots = n_pages, page_tokens, n_snapshots
        self._n_users = [0] * n_pages
        self._free = deque(range(n_pages))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, unused; oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._snapshot_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._free_snapshots = deque(range(n_snapshots))

    @property
    def n_free(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def n_cached(self) -> int:
        """Pages that hold a known prefix, used or not."""
        return len(self._page_of)

    def look(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """Return how many pages one could go on behind, and how many are known at all."""
        n_usable = n_known = 0
        for digest in digests:
            if digest not in self._page_of:
                break
            n_known += 1
            if digest in self._snapshot_of:
                n_usable = n_known
        return n_usable, n_known

    def match(self, digests: Sequence[bytes]) -> Prefix:
        """Find the longest prefix one can go on behind, and use its pages."""
        n, n_known = self.look(digests)
        pages = [self._page_of[d] for d in digests[:n]]
        for page in pages:
            self._idle.pop(page, None)
            self._n_users[page] += 1
        if not n:
            return Prefix(pages, None, n_known)
        self._snapshot_of.move_to_end(digests[n - 1])
        return Prefix(pages, self._snapshot_of[digests[n - 1]], n_known)

    def take(self, n: int) -> list[int]:
        """Use `n` pages, forgetting what unused ones hold.

        Raises:
            ValueError: there are not so many.
        """
        if n > self.n_free:
            raise ValueError(f"{n} pages wanted, {self.n_free} of {self.n_pages} are free")
        taken = []
        for _ in range(n):
            page = self._free.popleft() if self._free else self._forget_oldest()
            self._n_users[page] = 1
            taken.append(page)
        return taken

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        digest = self._digest_of.pop(page)
        del self._page_of[digest]
        if (snapshot := self._snapshot_of.pop(digest, None)) is not None:
            self._free_snapshots.append(snapshot)
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Use pages no longer; a prefix's last page is forgotten before its first one."""
        for page in reversed(pages):
            self._n_users[page] -= 1
            if self._n_users[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def publish(self, digest: bytes, page: int) -> None:
        """Let others find a page, which is full and in use; the first one of a prefix stays."""
        if digest not in self._page_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def reserve_snapshot(self, digest: bytes) -> int | None:
        """Return where to save a snapshot; None if there is one of this prefix, or no place.

        The one unused for longest makes room. Until it is published nobody is given it.
        """
        if digest in self._snapshot_of:
            self._snapshot_of.move_to_end(digest)
            return None
        if self._free_snapshots:
            return self._free_snapshots.popleft()
        return self._snapshot_of.popitem(last=False)[1] if self._snapshot_of else None

    def publish_snapshot(self, digest: bytes, place: int) -> None:
        """Let others go on behind a prefix: its snapshot is saved."""
        if digest in self._snapshot_of:
            self._free_snapshots.append(place)
        else:
            self._snapshot_of[digest] = place

    def drop_snapshot(self, digest: bytes) -> None:
        """Forget a snapshot that a later one of the same sequence replaces."""
        if (place := self._snapshot_of.pop(digest, None)) is not None:
            self._free_snapshots.append(place)
