"""A client that asks without a pause, and remembers every answer that it did not get."""

import threading
from collections import Counter
from types import TracebackType
from typing import Self

import numpy as np

from service.client import Client
from service.errors import ServerError

MODEL = "fashion-mnist-smoke"


class Load:
    """Threads that ask for one image each, again and again, over one connection."""

    def __init__(self, address: str, threads: int = 4) -> None:
        self._client = Client(address, timeout_s=60, wait_for_ready=True)
        self._images = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), np.uint8)
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(threads)]
        self.answers: Counter[str] = Counter()  # by version
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        self._client.close()

    def _ask(self) -> None:
        while not self._stopping.wait(0.01):
            try:
                self.answers[self._client.predict(self._images, model=MODEL).version] += 1
            except ServerError as error:
                self.failures.append(str(error))
