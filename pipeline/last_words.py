"""What a process of ours writes, without what it says because it is ended.

Told to end, or left by its clients, Prefect's temporary server may log how each of its requests
failed, with all its calls, into a terminal where one sentence has just said what happened.
"""

import os
import select
import threading
import time

LATE_S = 5.0  # that anything is passed on after it was written
CHUNK = 1 << 16  # bytes


class LastWords:
    """Passes on what is written to `descriptor`, late, until `drop` is called."""

    def __init__(self, to: int, *, late_s: float = LATE_S) -> None:
        """Start to read, in a thread, until all copies of `descriptor` are closed.

        Args:
            to: descriptor that is written to.
            late_s: seconds after which something is passed on; the last of a process that ends by
                itself at once.
        """
        self._to, self._late_s = to, late_s
        self._dropped = threading.Event()
        self._read, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Pass on nothing more: the process is told to end."""
        self._dropped.set()

    def _pass_on(self) -> None:
        held: list[tuple[float, bytes]] = []
        open_ = True
        while open_ or held:
            due_s = held[0][0] - time.monotonic() if open_ and held else None
            if open_ and (due_s is None or due_s > 0) and self._is_written(due_s):
                chunk = os.read(self._read, CHUNK)
                open_ = bool(chunk)
                held.append((time.monotonic() + self._late_s, chunk))
                continue
            _, chunk = held.pop(0)
            if not self._dropped.is_set():
                os.write(self._to, chunk)
        os.close(self._read)

    def _is_written(self, within_s: float | None) -> bool:
        return bool(select.select([self._read], [], [], within_s)[0])
