"""Which services take requests, and who is told when that changes; grpc.health.v1 without gRPC.

grpcio's own holds a lock while it writes to a watcher: one that does not read keeps every change
from everybody else, and the server from stopping.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping


class Health:
    """The health of every service by its name. Call its methods from one event loop."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._watchers: set[asyncio.Event] = set()
        self._stopping = False
        self._over = False

    def show(self, services: Mapping[str, bool]) -> None:
        """Set whether services take requests; one that is no longer among them does not."""
        if not self._stopping:
            self._serving = {**dict.fromkeys(self._serving, False), **services}
            self._tell()

    def stop(self) -> None:
        """Show that nothing takes requests any more, for good."""
        self.show({})
        self._stopping = True

    def close(self) -> None:
        """End every watch."""
        self._over = True
        self._tell()

    def services(self) -> dict[str, bool]:
        """Return whether each service takes requests."""
        return dict(self._serving)

    async def watch(self, service: str) -> AsyncIterator[bool | None]:
        """Tell a service's state, and every later one unless two come at once; until `close`.

        Yields:
            Whether it takes requests; None while there is no such service.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        shown: list[bool | None] = []
        try:
            while not self._over:
                changed.clear()
                state = self._serving.get(service)
                if shown != [state]:
                    shown = [state]
                    yield state
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _tell(self) -> None:
        for changed in self._watchers:
            changed.set()
