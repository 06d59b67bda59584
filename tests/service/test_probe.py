import datetime
import socket
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.access import Access
from service.errors import ServerError
from service.probe import Question, ask, dialled
from service.rpc import INFERENCE, Rpc

FRONTS = ("grpcio", "native")


def refusal(**question):
    with pytest.raises(ServerError) as caught:
        ask(Question(**question))
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("service", ["", "tiny", INFERENCE])
def test_a_server_that_takes_requests_is_ready(listen, rpc, service):
    address = listen(rpc)

    for ready in (False, True):
        assert ask(Question(address=address, service=service, ready=ready)) == "ready"


def test_a_server_without_a_model_is_live_and_not_ready(listen, open_repository, tmp_path):
    rpc = Rpc(open_repository(tmp_path))
    address = listen(rpc, ready=False)

    assert ask(Question(address=address)) == "live"
    assert refusal(address=address, ready=True) == (
        "UNAVAILABLE",
        f"{address} is live, and takes no requests now",
    )
    rpc.close()


def test_a_service_that_is_asked_about_must_take_requests(listen, rpc):
    address = listen(rpc, ready=False)

    assert refusal(address=address, service="tiny")[1] == "tiny is live, and takes no requests now"
    assert refusal(address=address, service="other") == (
        "NOT_FOUND",
        "'other' is no service or model of this server",
    )


def test_a_server_that_wants_tokens_is_asked_without(listen, rpc):
    address = listen(rpc, access=Access(("a-token-of-many-letters",), ()))

    assert ask(Question(address=address)) == "ready"


def test_a_server_that_is_not_there_is_said_to_be_so():
    assert refusal(address="127.0.0.1:1")[1].startswith("no server answers at 127.0.0.1:1")


def test_one_that_takes_the_connection_and_says_nothing_is_not_waited_for_longer_than_asked():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        assert refusal(address=address, timeout_s=0.2)[0] == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_a_time_that_cannot_be_waited_is_refused(timeout_s):
    with pytest.raises(ValueError, match="timeout_s is "):
        ask(Question(timeout_s=timeout_s))


@pytest.mark.parametrize(
    ("listened", "asked"),
    [
        ("0.0.0.0:8001", "127.0.0.1:8001"),
        (":8001", "127.0.0.1:8001"),
        ("[::]:8001", "[::1]:8001"),
        ("10.0.0.0:8001", "10.0.0.0:8001"),
        ("inference:8001", "inference:8001"),
        ("[::1]:8001", "[::1]:8001"),
    ],
)
def test_who_listens_everywhere_is_asked_on_this_host(listened, asked):
    assert dialled(listened) == asked


@pytest.fixture
def certificate(tmp_path):
    """Write a certificate for the host `inference`, which only itself vouches for, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "inference")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("inference")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths[0].write_bytes(made.public_bytes(pem))
    paths[1].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return paths


@pytest.mark.only_grpcio("the native front speaks no TLS")
def test_a_server_with_tls_is_asked_for_the_name_in_its_certificate(listen, rpc, certificate):
    cert, key = certificate
    address = listen(rpc, tls_cert=cert, tls_key=key)

    assert ask(Question(address=address, tls_ca=cert, tls_name="inference")) == "ready"
    assert refusal(address=address, tls_ca=cert)[0] == "UNAVAILABLE"
    assert "no TLS connection" in refusal(address=address, tls_name="inference")[1]


@pytest.mark.only_grpcio("the native front speaks no TLS")
def test_a_server_that_asks_for_certificates_is_shown_one(listen, rpc, certificate):
    cert, key = certificate
    address = listen(rpc, tls_cert=cert, tls_key=key, tls_client_ca=cert)
    known = {"address": address, "tls_ca": cert, "tls_name": "inference"}

    assert ask(Question(**known, tls_cert=cert, tls_key=key)) == "ready"
    assert refusal(**known)[0] == "UNAVAILABLE"


def test_a_server_is_asked_without_numpy_and_without_the_client():
    code = (
        "import sys; from service import probe; "
        "assert not {'numpy', 'service.client', 'onnxruntime'} & set(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
