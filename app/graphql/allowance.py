"""How many new documents one caller may send to this process in a minute.

A document that the process has not read yet, or has forgotten, is parsed and validated: milliseconds of its one loop,
in which nobody else is served. One that it remembers costs nothing of this, and is not counted, unless it asks for the
schema itself: then executing it is what takes long.

A rate limit by GCRA, like that of mutations, with a burst of a whole minute. It is kept in memory, because it protects
this process alone, and asking a database would cost more than most documents. Knows no transport and no documents: a
caller is whatever hashes.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from math import ceil
from typing import Final

from app import errors

_MINUTE: Final = 60.0
_MAX_CALLERS: Final = 10_000
"""Remembered at a time. Those who have not sent anything new for the longest are forgotten first, in their favor."""


class Allowance:
    """Each caller's, of `per_minute` units; 0: without a limit. `clock` counts seconds, from whenever."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = per_minute
        self._clock = clock
        self._whole_at: OrderedDict[Hashable, float] = OrderedDict()
        """By caller: when all of it will have come back."""

    def spend(self, caller: Hashable, units: int) -> None:
        """Raises `RateLimited` when the caller has less left, and then uses nothing. What is more than the whole
        allowance costs all of it."""
        if not self._burst:
            return
        now, unit = self._clock(), _MINUTE / self._burst
        whole_at = max(self._whole_at.get(caller, now), now) + min(units, self._burst) * unit
        # A hundredth of a unit is what sums of fractions may be off.
        wait = whole_at - now - _MINUTE - unit / 100
        if wait > 0:
            seconds = ceil(wait)
            raise errors.RateLimited(
                "Too many new documents, or questions about the schema, in a short time. Send values as variables: a "
                "document that was sent before, and does not introspect, is not counted. "
                f"Try again in {seconds} second{'' if seconds == 1 else 's'}.",
                retry_after=seconds,
            )
        self._whole_at[caller] = whole_at
        self._whole_at.move_to_end(caller)
        if len(self._whole_at) > _MAX_CALLERS:
            self._whole_at.popitem(last=False)
