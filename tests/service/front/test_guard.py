"""The parts of the guard; what it does to real clients of a front is tested in test_native.py."""

import os
import time

from service import host
from service.front import guard
from service.front.guard import Guard, limit_bytes

MIB = 1 << 20
WAIT_S = 30


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_connections_are_ended_once_the_process_has_grown_to_its_limit(
    listening, address, connect, ended, caplog
):
    client = connect(listening)
    watching = Guard(_own() + 64 * MIB, settle_s=0.1)
    watching.start(address)
    try:
        time.sleep(0.2)  # which gives it time to do the wrong thing
        assert not ended(client)
        held = [b"x" * (128 * MIB)]
        until(lambda: ended(client))
        until(lambda: "ended 1 connections: this process has " in caplog.text)

        time.sleep(0.4)  # what is held now is nobody's message
        other = connect(listening)
        time.sleep(0.3)
        assert not ended(other)

        def ended_by_more():
            held.append(b"x" * (128 * MIB))
            return ended(other, within_s=5)

        until(ended_by_more)  # the first may come before the new limit is set
    finally:
        watching.stop()


def _own():
    statm = os.open(guard.STATM, os.O_RDONLY)
    try:
        return guard._resident(statm)
    finally:
        os.close(statm)


def test_limit_is_a_share_of_the_memory_there_is_for_all_processes_together():
    limit, free = limit_bytes(1), host.available_bytes()

    assert limit is not None
    assert free is not None
    assert 0 < limit <= 0.6 * free
    assert 0 < (limit_bytes(4) or 0) < limit / 3


def test_guard_that_was_never_started_can_be_stopped():
    Guard(limit_bytes=0).stop()
