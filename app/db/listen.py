"""Waiting for a hint that there is work. A hint is never the work itself: what is due is in the tables."""

import asyncio
from collections.abc import Callable

Tell = Callable[[str | None], None]
"""Called with what a notification carries; with None when some may have been missed. It must not raise or wait."""


class Wakeups:
    """What a listener waits on. Several hints between two waits are one."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Return True as soon as there was a hint since the last wait, False after `seconds` without one.

        Counts as a hint: that listening has begun or begun again, and that the connection was lost; what was
        sent in between cannot be known.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True
