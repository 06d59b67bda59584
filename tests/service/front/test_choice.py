import pytest

from service import host
from service.errors import SettingsError
from service.front import choice
from service.front.choice import Choice, choose, is_local
from service.settings import Settings


@pytest.fixture
def chosen(tmp_path):
    """Return a function that chooses for some settings."""

    def chosen(**changes):
        return choose(Settings(repository=tmp_path, **changes))

    return chosen


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(choice, "LIBRARY", "no_such_library")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:0", "localhost:0"])
def test_native_front_is_chosen_where_only_this_host_reaches_the_address(chosen, address):
    assert chosen(address=address) == Choice("native", f"only this host reaches {address}")


def test_native_front_is_chosen_for_a_socket_in_the_file_system(chosen):
    assert chosen(address="unix:/tmp/a").front == "native"


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_native_front_is_not_chosen_where_others_reach_the_address(chosen, address):
    assert chosen(address=address) == Choice("grpcio", f"others than this host reach {address}")


def test_native_front_is_chosen_behind_a_proxy_wherever_it_listens(chosen):
    found = chosen(address="0.0.0.0:0", behind_proxy=True)

    assert found == Choice("native", "a proxy bounds what clients send")


def test_front_that_is_asked_for_is_chosen_wherever_it_listens(chosen):
    for front in ("native", "grpcio"):
        for address in ("0.0.0.0:0", "127.0.0.1:0"):
            assert chosen(front=front, address=address) == Choice(front, "it was asked for")


LACKING = [
    ({"tls_cert": "a", "tls_key": "b"}, "it has no TLS"),
    ({"max_connection_age_s": 60.0}, "it does not limit a connection's age"),
]


@pytest.mark.parametrize(("changes", "reason"), LACKING)
def test_native_front_is_not_chosen_for_what_it_cannot_do(chosen, changes, reason):
    assert chosen(behind_proxy=True, **changes) == Choice("grpcio", reason)


@pytest.mark.parametrize(("changes", "reason"), LACKING)
def test_native_front_that_is_asked_for_what_it_cannot_do_is_refused(chosen, changes, reason):
    with pytest.raises(SettingsError) as caught:
        chosen(front="native", **changes)

    assert str(caught.value) == f"front is 'native', but {reason}; choose auto or grpcio"


def test_grpcio_serves_where_the_native_library_is_not_installed(chosen, without_library):
    assert chosen() == Choice("grpcio", "no_such_library is not installed")
    with pytest.raises(SettingsError, match="no_such_library is not installed; choose"):
        chosen(front="native")


def test_cpus_that_this_process_may_not_use_are_refused_with_those_it_may(chosen, monkeypatch):
    monkeypatch.setattr(host, "cpus", lambda: {4, 6})

    assert chosen(io_cpus="4,6").front == "native"
    with pytest.raises(SettingsError) as caught:
        chosen(io_cpus="4-6")
    assert str(caught.value) == (
        "io_cpus is '4-6', expected some of 4,6, the CPUs that this process may use"
    )


def test_cpus_are_not_looked_at_where_the_front_ignores_them(chosen):
    assert chosen(front="grpcio", io_cpus="9999").front == "grpcio"


def test_cpus_are_refused_where_nothing_can_be_kept_to_them(chosen, monkeypatch):
    monkeypatch.setattr(host, "cpus", set)

    with pytest.raises(SettingsError, match="only Linux keeps threads to CPUs; leave it out"):
        chosen(io_cpus="0")


def test_address_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="expected HOST:PORT"):
        is_local("nonsense")
