import queue
import socket
import threading
import time

import pytest

from pipeline import replicas
from pipeline.replicas import Name, Replica, Replicas
from service.client import Client
from service.errors import ServerError

WAIT_S = 60


class Server(Client):
    """A server as a client: it samples the objects that it is given, until it is closed."""

    def __init__(self, address="", *sampled):
        self.address = address
        self.sampled = list(sampled)  # what is no exception is given, and that is raised
        self.asked = 0
        self.closed = threading.Event()
        self.answer = None  # raised to who asks whether it is there

    def sample(self, model=""):
        self.asked += 1
        while self.sampled:
            found = self.sampled.pop(0)
            if isinstance(found, Exception):
                raise found
            yield found
        self.closed.wait(WAIT_S)
        raise ServerError("Channel closed!", code="CANCELLED")

    def models(self, *, timeout_s=None):
        if self.answer is not None:
            raise self.answer
        return []

    def close(self):
        self.closed.set()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(replicas, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(replicas, "LOOK_UP_S", 0.01)


class Names:
    """What a name stands for; None: it cannot be resolved now."""

    def __init__(self, *addresses):
        self.addresses = set(addresses)
        self.looks = 0

    def __call__(self):
        self.looks += 1
        if self.addresses is None:
            raise socket.gaierror("Name or service not known")
        return self.addresses

    def become(self, *addresses):
        self.addresses = set(addresses)
        self.settle()

    def settle(self):
        """Wait until it was looked up since."""
        until = self.looks + 2
        eventually(lambda: self.looks >= until)


def eventually(found):
    until_s = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def reading(server, **options):
    """Begin to read what a server samples; return the replica and the queue that is filled."""
    waiting: queue.Queue[replicas.Found] = queue.Queue(16)
    replica = Replica(server, **options)
    replica.read("", waiting)
    return replica, waiting


@pytest.fixture
def names():
    return Names("a:1", "b:1")


@pytest.fixture
def watched(names):
    with Replicas(names, Server) as watched:
        watched.watch()
        names.settle()
        yield watched


def addresses(found):
    return [one.address for one in found]


def test_every_address_is_a_server_with_a_client_of_its_own_and_comes_once(watched):
    new, gone = watched.follow()

    assert addresses(new) == [one.client.address for one in new] == ["a:1", "b:1"]
    assert gone == []
    assert watched.follow() == ([], [])


def test_an_address_that_comes_later_is_followed_and_the_others_stay(watched, names):
    watched.follow()
    names.become("a:1", "b:1", "c:1")

    assert [addresses(found) for found in watched.follow()] == [["c:1"], []]


def test_a_server_goes_only_when_it_was_lost_and_is_no_longer_named(watched, names):
    one, other = watched.follow()[0]
    one.lost = True  # but named
    names.become("a:1")  # the other is not, and sends on
    assert watched.follow() == ([], [])

    other.lost = True

    assert watched.follow() == ([], [other])
    assert other.client.closed.is_set()
    assert not one.client.closed.is_set()


def test_an_address_that_went_comes_back_with_another_client(watched, names):
    other = watched.follow()[0][1]
    names.become("a:1")
    other.lost = True
    watched.follow()
    names.become("a:1", "b:1")

    ((new,), _) = watched.follow()

    assert new.address == other.address
    assert new.client is not other.client


def test_a_name_that_cannot_be_resolved_is_said_once_and_changes_nothing(watched, names, caplog):
    one, _ = watched.follow()[0]
    names.addresses = None
    names.settle()
    one.lost = True

    assert watched.follow() == ([], [])
    assert caplog.text.count("addresses are not known: Name or service not known") == 1


def test_a_server_that_keeps_its_connection_and_no_longer_answers_is_connected_anew(
    watched, names, monkeypatch
):
    one, _ = watched.follow()[0]
    one.client.answer = ServerError("late", code="DEADLINE_EXCEEDED")
    monkeypatch.setattr(replicas, "IDLE_S", 0.0)
    eventually(lambda: one.silent)

    new, gone = watched.follow()

    assert gone == [one]
    assert addresses(new) == ["a:1"]


@pytest.mark.parametrize("code", [None, "UNAVAILABLE", "PERMISSION_DENIED"])
def test_a_server_that_refuses_or_was_lost_is_not_silent(code, monkeypatch):
    monkeypatch.setattr(replicas, "IDLE_S", 0.0)
    server = Server()
    server.answer = code and ServerError("no", code=code)
    replica = Replica(server)

    replica.check()

    assert not replica.silent


def test_a_server_that_sends_rows_is_not_asked_whether_it_is_there():
    server = Server()
    server.answer = AssertionError("it was asked")

    Replica(server).check()


def test_rows_come_with_the_server_that_sent_them():
    replica, waiting = reading(Server("", "rows", "more"))

    assert [waiting.get(timeout=WAIT_S) for _ in range(2)] == [(replica, "rows"), (replica, "more")]
    assert not replica.lost
    replica.close()


def test_a_server_that_was_lost_is_asked_again_and_is_lost_until_rows_come(caplog):
    gone = ServerError("nobody is there", code="UNAVAILABLE")
    server = Server("", gone, gone)
    replica, waiting = reading(server, address="a:1")
    eventually(lambda: server.asked == 3)
    assert replica.lost
    server.sampled.append("rows")
    server.closed.set()  # so that the call ends, and the next one has rows

    assert waiting.get(timeout=WAIT_S) == (replica, "rows")
    replica.close()
    assert caplog.text.count("a:1 no rows: nobody is there; trying again") == 1


def test_a_refusal_is_told_and_the_server_asked_again_later(monkeypatch):
    monkeypatch.setattr(replicas, "REFUSED_S", 0.01)
    refusal = ServerError("no", code="PERMISSION_DENIED")
    replica, waiting = reading(Server("", refusal, "rows"))

    assert [waiting.get(timeout=WAIT_S) for _ in range(2)] == [
        (replica, refusal),
        (replica, "rows"),
    ]
    replica.close()


def test_who_has_closed_it_reads_no_more_and_no_thread_is_left():
    before = threading.active_count()
    server = Server("", *range(100))
    replica, _ = reading(server)  # nobody empties the queue
    eventually(lambda: len(server.sampled) < 100)

    replica.close()

    eventually(lambda: threading.active_count() <= before)
    assert server.sampled


def test_a_client_that_is_closed_before_it_is_asked_ends_the_reading():
    class Closed(Server):
        def sample(self, model=""):
            replica.end()
            raise ValueError("Cannot invoke RPC on closed channel!")
            yield

    before = threading.active_count()
    replica = Replica(Closed())
    replica.read("", queue.Queue())

    eventually(lambda: threading.active_count() <= before)


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("inference:8001", Name("inference", 8001)),
        ("127.0.0.1:8001", Name("127.0.0.1", 8001)),
        ("[::1]:8001", Name("::1", 8001)),
    ],
)
def test_an_endpoint_is_a_host_and_a_port(endpoint, name):
    assert Name.of(endpoint) == name


@pytest.mark.parametrize("endpoint", ["inference", ":8001", "inference:", "inference:http", ""])
def test_what_is_no_host_with_a_port_is_refused(endpoint):
    with pytest.raises(ValueError, match="expected HOST:PORT, such as server:8001"):
        Name.of(endpoint)


def resolving(monkeypatch, *hosts):
    """Have every name stand for some hosts."""

    def found(host, port, **_):
        kinds = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in hosts]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (one, port))
            for kind, one in zip(kinds, hosts, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_a_name_has_each_of_its_addresses_once(monkeypatch):
    resolving(monkeypatch, "10.0.0.2", "10.0.0.1", "10.0.0.2")

    assert Name("inference", 8001).addresses() == {"10.0.0.1:8001", "10.0.0.2:8001"}


def test_a_server_with_addresses_of_both_kinds_is_one_server(monkeypatch):
    resolving(monkeypatch, "fd00::1", "10.0.0.1")

    assert Name("inference", 8001).addresses() == {"10.0.0.1:8001"}


def test_a_name_without_addresses_of_ipv4_has_its_others(monkeypatch):
    resolving(monkeypatch, "fd00::1", "fd00::2")

    assert Name("inference", 8001).addresses() == {"[fd00::1]:8001", "[fd00::2]:8001"}
