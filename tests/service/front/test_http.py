import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from service.errors import AddressError, SettingsError
from service.front import http as front
from service.front.http import MAX_CONNECTIONS, MetricsServer


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves a text on a free port and returns its address."""
    servers = []

    def serve(text: Callable[[], bytes] = lambda: b"up 1\n", address: str = "127.0.0.1:0") -> str:
        servers.append(MetricsServer(address, text))
        return servers[-1].start()

    yield serve
    for server in servers:
        server.stop()


def get(
    address: str, path: str = "/metrics", method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_metrics_are_answered_as_prometheus_text_made_anew_each_time(serve):
    texts = iter([b"up 1\n", b"up 2\n"])
    address = serve(lambda: next(texts))

    status, headers, body = get(address)
    assert (status, body) == (200, b"up 1\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Server"] == "train-export"
    assert get(address, "/metrics?name=x")[2] == b"up 2\n"


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metricsx", "/favicon.ico"])
def test_any_other_path_is_not_found(serve, path):
    assert get(serve(), path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_but_get_is_done(serve, method):
    assert get(serve(), method=method)[0] == 501


def test_no_address_is_no_server():
    server = MetricsServer("", lambda: b"")

    assert server.start() == ""
    server.stop()


def test_address_is_free_again_after_a_stop(serve):
    server = MetricsServer("127.0.0.1:0", lambda: b"first")
    address = server.start()
    assert get(address)[2] == b"first"
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(address)

    assert serve(lambda: b"second", address) == address
    assert get(address)[2] == b"second"


def test_address_that_is_in_use_is_refused_with_a_sentence(serve):
    address = serve()

    with pytest.raises(AddressError) as caught:
        serve(address=address)
    assert str(caught.value) == (
        f"cannot listen on {address}: another process listens there already, which you may "
        "stop; choose another with --metrics-address HOST:PORT (port 0 takes a free one)"
    )


@pytest.mark.parametrize(
    "address",
    ["8002", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80", "a:b:1"],
)
def test_address_that_is_none_is_refused_with_what_one_looks_like(serve, address):
    with pytest.raises(SettingsError, match="expected HOST:PORT, such as") as caught:
        serve(address=address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 300, "ü" * 300, "300.1.1.1"])
def test_host_that_is_not_known_is_refused_by_name(serve, host):
    with pytest.raises(AddressError, match="its host is not known") as caught:
        serve(address=f"{host}:0")
    assert host in str(caught.value)


def test_address_of_another_machine_is_refused(serve):
    with pytest.raises(AddressError, match=r"cannot listen on 192\.0\.2\.1:0"):
        serve(address="192.0.2.1:0")


def test_no_host_is_every_address_of_this_machine(serve):
    address = serve(address=":0")

    assert address.startswith(":")
    assert get(f"127.0.0.1{address}")[0] == 200


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 here")
def test_ipv6_is_listened_on(serve):
    address = serve(address="[::1]:0")

    assert address.startswith("[::1]:")
    assert get(address)[0] == 200


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /metrics HTTP/1.1\r\n\xff\x00: \x1b[2J\r\n\r\n",
    ],
)
def test_junk_is_neither_logged_nor_harmful(serve, junk, caplog, capfd):
    address = serve()
    with connect(address) as client, contextlib.suppress(ConnectionError):  # it may be cut short
        client.sendall(junk)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass

    assert get(address)[0] == 200
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_client_that_goes_away_is_not_logged(serve, caplog, capfd):
    gone = threading.Event()

    def text() -> bytes:
        assert gone.wait(30)
        return b"x" * 10_000_000

    address = serve(text)
    with connect(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    gone.set()

    assert len(get(address)[2]) == 10_000_000
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_failure_to_collect_is_logged_and_told_without_its_reason(serve, caplog):
    def text() -> bytes:
        raise RuntimeError("/secret/path")

    status, _, body = get(serve(text))

    assert (status, body) == (500, b"500\n")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "/secret/path" in str(record.exc_info[1])


def test_idle_clients_do_not_keep_others_waiting_and_are_cut_off(serve, monkeypatch):
    monkeypatch.setattr(front, "MAX_CONNECTION_S", 2.0)
    address = serve()
    idle = [connect(address) for _ in range(MAX_CONNECTIONS - 1)]
    try:
        for client in idle:
            client.sendall(b"GET /met")

        assert get(address)[0] == 200
        for client in idle:
            with contextlib.suppress(ConnectionError):  # which is cut off as well
                assert client.recv(1) == b""
    finally:
        for client in idle:
            client.close()


def test_client_that_sends_byte_by_byte_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(front, "MAX_CONNECTION_S", 0.2)
    with connect(serve()) as client:
        until_s = time.monotonic() + 60
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            while time.monotonic() < until_s:
                client.sendall(b"a")


def test_connections_beyond_the_limit_are_closed_at_once_and_taken_again_later(serve):
    address = serve()
    held = [connect(address) for _ in range(MAX_CONNECTIONS)]
    for client in held:
        client.sendall(b"GET /met")
    with connect(address) as client:
        assert client.recv(1) == b""
    for client in held:
        client.close()

    until_s = time.monotonic() + 60
    while True:  # until the last of them is noticed to be gone
        try:
            assert get(address)[0] == 200
            break
        except (ConnectionError, http.client.HTTPException):
            assert time.monotonic() < until_s
