"""Room for connections that stay: how many one process holds at a time, in all and of one caller.

Each takes memory for as long as it pleases its client, so there are only so many; who comes too late is told to come
again. Knows no transport and no caller: a caller is whatever hashes.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from app import errors


class Places:
    def __init__(self, most: int, *, most_each: int) -> None:
        self._most = most
        self._most_each = most_each
        self._taken = 0
        self._by_caller: Counter[Hashable] = Counter()

    @contextmanager
    def taken(self) -> Iterator[Callable[[Hashable], None]]:
        """A place for as long as the block lasts, and what says whose it is, to be called once.

        Both raise `Unavailable` where there is no room."""
        if self._taken >= self._most:
            raise errors.Unavailable(f"All {self._most} places for streams are taken. Try again in a moment.")
        owner: list[Hashable] = []

        def belongs_to(caller: Hashable) -> None:
            if self._by_caller[caller] >= self._most_each:
                raise errors.Unavailable(
                    f"One caller has at most {self._most_each} streams open at a time: end those that you do not need."
                )
            self._by_caller[caller] += 1
            owner.append(caller)

        self._taken += 1
        try:
            yield belongs_to
        finally:
            self._taken -= 1
            for caller in owner:
                self._by_caller[caller] -= 1
                if not self._by_caller[caller]:
                    del self._by_caller[caller]
