import socket

import pytest

from pipeline.endpoint import Endpoint
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8001", "inference:1", "[::1]:65535", "a.example:80", "unix:/run/s.sock"]
)
def test_a_host_with_a_port_is_an_address(address):
    assert Endpoint(address).address == address


@pytest.mark.parametrize(
    "address",
    [
        "http://foo", "http://foo:80", "dns:///foo:80", "127.0.0.1:99999", "127.0.0.1:0",
        "127.0.0.1", ":8001", "::1:8001", "foo:", "foo:80/", "foo bar:80", "",
        "foo:\uff18\uff10", "unix:",
    ],
)  # fmt: skip
def test_anything_else_is_refused_at_once(address):
    with pytest.raises(ConfigError, match="expected HOST:PORT with a port from 1 to 65535"):
        Endpoint(address)


@pytest.mark.parametrize("family", ["tcp", "tcp6", "unix"])
def test_it_is_known_whether_anybody_listens(tmp_path, family):
    if family == "unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "s"))
        server.listen()
        address = f"unix:{tmp_path / 's'}"
    else:
        at, kind = {"tcp": ("127.0.0.1", socket.AF_INET), "tcp6": ("::1", socket.AF_INET6)}[family]
        try:
            server = socket.create_server((at, 0), family=kind)
        except OSError:
            pytest.skip(f"this host has no {at}")
        address = f"{f'[{at}]' if ':' in at else at}:{server.getsockname()[1]}"

    with server:
        assert Endpoint(address).listens()

    assert not Endpoint(address).listens()
    assert not Endpoint("a..b:80").listens()
