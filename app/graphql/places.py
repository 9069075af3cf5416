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
        self._by_owner: Counter[Hashable] = Counter()

    @contextmanager
    def taken(self) -> Iterator[Callable[[Hashable], None]]:
        """A place for as long as the block lasts, and what says whose it is, to be called once. Until then it is
        nobody's, and all those who have not said who they are share what one caller may have.

        Both raise `Unavailable` where there is no room."""
        owner: Hashable = None
        if self._taken >= self._most or self._by_owner[owner] >= self._most_each:
            raise errors.Unavailable("All places for streams are taken. Try again in a moment.")
        self._taken += 1
        self._by_owner[owner] += 1

        def belongs_to(caller: Hashable) -> None:
            nonlocal owner
            if self._by_owner[caller] >= self._most_each:
                raise errors.Unavailable(
                    f"One caller has at most {self._most_each} streams open at a time: end those that you do not need."
                )
            self._leave(owner)
            owner = caller
            self._by_owner[owner] += 1

        try:
            yield belongs_to
        finally:
            self._taken -= 1
            self._leave(owner)

    def _leave(self, owner: Hashable) -> None:
        self._by_owner[owner] -= 1
        if not self._by_owner[owner]:
            del self._by_owner[owner]
