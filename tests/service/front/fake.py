"""What a front serves, where the front is tested."""

from typing import Any

from service.rpc import INFER
from tests.service.front.hostile import LIVE


class Fake:
    """An Rpc that answers everything at once, or leaves it to the test."""

    paths = (INFER, LIVE)
    streamed = INFER
    streaming: tuple[str, ...] = ()

    def __init__(self, answer=lambda call: call.answer(b"")):
        self.calls: list[Any] = []
        self._answer = answer

    def begin(self, call):
        self.calls.append(call)
        self._answer(call)

    def run(self, calls, longest_s, expect=None):
        for call in calls:
            self.begin(call)
