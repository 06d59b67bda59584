"""Notice what happens outside: a folder that may have changed, a parent that has ended.

The file system's events come at once but not from every file system; a look now and then misses
nothing.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)
SETTLE_MS = 200  # events that follow each other faster are one change


def looks(root: Path, poll_s: float, stop: threading.Event) -> Iterator[None]:
    """Yield whenever it is time to look at a folder again, until `stop` is set; blocks between.

    Args:
        root: the folder, with everything below it but what is hidden.
        poll_s: longest time between two looks.
        stop: set from another thread.
    """
    while not stop.is_set():
        try:
            # After the first version is loaded, which clients wait for. That they have taken all
            # descriptors by now is no reason to end.
            import watchfiles  # noqa: PLC0415

            for _ in watchfiles.watch(
                root,
                watch_filter=_Visible(root),
                debounce=SETTLE_MS,
                step=SETTLE_MS // 4,
                stop_event=stop,
                rust_timeout=max(1, round(poll_s * 1000)),
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                yield
        except (OSError, RuntimeError, ImportError) as error:
            log.warning("no events from the file system: %s; looking every %g s", error, poll_s)
            stop.wait(poll_s)
            yield


def when_stdin_ends(callback: Callable[[], object]) -> None:
    """Call back, from a thread, once standard input is closed, as by the end of the parent.

    A thread, because files and terminals cannot be polled.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: its lock would outlive us
            pass
        callback()

    threading.Thread(target=wait, daemon=True).start()


class _Visible:
    """A filter for watchfiles: leaves out what is hidden below the folder, as what is staged."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def __call__(self, _: object, path: str) -> bool:
        try:
            parts = Path(path).relative_to(self._root).parts
        except ValueError:
            return True
        return not any(part.startswith(".") for part in parts)
