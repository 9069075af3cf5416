"""Room for what stays: how many streams, or sockets, one process holds at a time, in all and of one caller.

Each takes memory for as long as it pleases its client, so there are only so many. Knows no transport and no caller: a
caller is whatever hashes.
"""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final

from app import errors

_COME_AGAIN_SECONDS: Final = 60


class Places:
    def __init__(self, most: int, *, most_each: int) -> None:
        self.most = most
        self.most_each = most_each
        self._taken = 0
        self._by_caller: Counter[Hashable] = Counter()

    @contextmanager
    def taken(self, caller: Hashable) -> Iterator[None]:
        """A place for as long as the block lasts. Raises `RateLimited` when the caller has as many as one may have,
        `Unavailable` when there is no room for anybody."""
        if self._taken >= self.most:
            raise errors.Unavailable("All places are taken. Try again in a moment.")
        if self._by_caller.get(caller, 0) >= self.most_each:
            raise errors.RateLimited(
                f"One caller has at most {self.most_each} open at a time. End those that you do not need.",
                retry_after=_COME_AGAIN_SECONDS,
            )
        self._taken += 1
        self._by_caller[caller] += 1
        try:
            yield
        finally:
            self._taken -= 1
            self._by_caller[caller] -= 1
            if not self._by_caller[caller]:
                del self._by_caller[caller]
