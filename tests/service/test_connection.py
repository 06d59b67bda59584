import datetime
import ipaddress
import socket
import threading

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protos import inference_pb2 as pb
from service.client import Client, Tls
from service.errors import ServerError

NOBODY = "127.0.0.1:1"
MIB = 1 << 20
CODE = grpc.StatusCode


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


# What is refused before anything is opened


@pytest.mark.parametrize(
    ("option", "below", "above"),
    [
        ("timeout_s", -1, float("nan")),
        ("channels", 0, 1025),
        ("coalesce_rows", -1, (1 << 20) + 1),
        ("max_message_mib", 0, 2048),
    ],
)
def test_option_that_cannot_work_is_refused(option, below, above):
    for value in (below, above):
        with pytest.raises(ValueError, match=f"{option} is {value}, expected"):
            Client(NOBODY, **{option: value})


@pytest.mark.parametrize("token", ["", "with space", "line\n", "naïve"])
def test_token_that_cannot_be_sent_is_refused_without_being_told(token):
    with pytest.raises(ValueError, match="token is empty, or has spaces or other") as caught:
        Client(NOBODY, token=token)
    assert not token or token not in str(caught.value)


def test_tls_that_cannot_work_is_refused_and_does_not_show_its_key(tmp_path):
    with pytest.raises(ValueError, match="certificate and key need each other"):
        Tls(key=b"secret")
    with pytest.raises(ValueError, match="certificate and key need each other"):
        Tls(certificate=b"chain")
    with pytest.raises(ValueError, match=r"ca.pem cannot be read: No such file"):
        Client(NOBODY, tls=Tls(ca=tmp_path / "ca.pem"))
    assert "secret" not in repr(Tls(key=b"secret", certificate=b"chain"))


# What goes wrong


def test_refusal_carries_the_servers_code_and_sentence(serve, refusing):
    sentence = "Request for unknown model: 'none' is not found"
    none = refusing(None, code=CODE.NOT_FOUND)

    def about(request, context):
        context.abort(CODE.NOT_FOUND, sentence)

    with Client(serve(ModelMetadata=about, ModelConfig=none)) as client:
        assert refusal(client.metadata, "none") == ("NOT_FOUND", sentence)
        assert refusal(client.config, "none") == ("NOT_FOUND", "Exceeds maximum queue size")
        assert refusal(client.models)[0] == "UNIMPLEMENTED"


def test_server_that_is_not_there_is_said_to_be_so():
    with Client(NOBODY) as client:
        assert refusal(client.models) == (
            "UNAVAILABLE",
            f"no server answers at {NOBODY}; start one with: "
            "serve-export serve --repository models",
        )
    with Client("nowhere.invalid:1") as client:
        assert "no server answers at nowhere.invalid:1" in refusal(client.models)[1]


def test_who_waits_for_a_server_is_answered_by_one_that_starts_late(serve, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with Client(address, wait_for_ready=True, timeout_s=30) as client:
        late = threading.Timer(1, lambda: serve(address=address, **model.methods()))
        late.start()
        assert client.metadata("tiny").name == "tiny"
        late.join()
    with Client(NOBODY, wait_for_ready=True, timeout_s=0.5) as client:
        assert refusal(client.models)[0] == "DEADLINE_EXCEEDED"


def test_refusal_as_unavailable_is_not_taken_for_an_absent_server(serve):
    sentence = "Request for unknown model: 'tiny' version 2 is not at ready state"

    def about(request, context):
        context.abort(CODE.UNAVAILABLE, sentence)

    with Client(serve(ModelMetadata=about)) as client:
        assert refusal(client.metadata, "tiny", "2") == ("UNAVAILABLE", sentence)


def limited(name, size):
    return [(f"grpc.max_{name}_message_length", size)]


@pytest.mark.parametrize(
    ("request_bytes", "answer_bytes", "options", "sentence"),
    [
        (
            MIB + 1,
            1,
            limited("receive", -1),
            "the request has {}, this client sends at most 1,048,576; ask about fewer images at "
            "a time, or raise max_message_mib of the client",
        ),
        (
            MIB // 2,
            1,
            limited("receive", 1000),
            "the request has {}, the server takes at most 1,000; ask about fewer images at a "
            "time, or raise --max-message-mib (SERVE_EXPORT_MAX_MESSAGE_MIB) of the server",
        ),
        (
            1,
            2000,
            limited("send", 1000),
            "the answer has {}, the server sends at most 1,000; ask about fewer images at a "
            "time, or raise --max-message-mib (SERVE_EXPORT_MAX_MESSAGE_MIB) of the server",
        ),
        (
            1,
            MIB + 1,
            limited("receive", -1),
            "the answer has {}, this client takes at most 1,048,576; ask about fewer images at "
            "a time, or raise max_message_mib of the client",
        ),
    ],
)
def test_message_over_a_limit_names_the_side_and_what_to_raise(
    serve, request_bytes, answer_bytes, options, sentence
):
    def about(request, context):
        return pb.ModelMetadataResponse(name="n" * answer_bytes)

    with Client(serve(ModelMetadata=about, options=options), max_message_mib=1) as client:
        code, said = refusal(client.metadata, "n" * request_bytes)

    size = int(said.split(" bytes")[0].split()[-1].replace(",", ""))
    assert max(request_bytes, answer_bytes) <= size < max(request_bytes, answer_bytes) + 10
    assert (code, said) == ("RESOURCE_EXHAUSTED", sentence.format(f"{size:,} bytes"))


# Trying again


def test_unavailable_server_is_asked_again(serve, refusing, model, tiny):
    infer = refusing(model.infer, times=2, pushback=1)
    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        client.predict(tiny.images(1), model="tiny")
    assert infer.calls == 3


def test_big_request_is_asked_again_too(serve, refusing, model):
    model.shape = (1024, 1024)
    infer = refusing(model.infer, times=2)
    with Client(serve(**model.methods() | {"ModelInfer": infer})) as client:
        client.predict(np.zeros((2, 1024, 1024), np.uint8), model="tiny")
    assert infer.calls == 3


def test_server_is_asked_five_times_and_then_believed(serve, refusing, model):
    about = refusing(model.about)
    with Client(serve(ModelMetadata=about)) as client:
        assert refusal(client.metadata, "tiny") == ("UNAVAILABLE", "Exceeds maximum queue size")
    assert about.calls == 5


def test_server_that_asks_not_to_be_asked_again_is_not(serve, refusing, model):
    about = refusing(model.about, pushback=-1)
    with Client(serve(ModelMetadata=about)) as client:
        assert refusal(client.metadata, "tiny")[0] == "UNAVAILABLE"
    assert about.calls == 1


def test_time_that_the_server_asks_for_is_waited_within_the_deadline(serve, refusing, model):
    about = refusing(model.about, times=1, pushback=60_000)
    with Client(serve(ModelMetadata=about), timeout_s=3) as client:
        assert refusal(client.metadata, "tiny")[0] == "DEADLINE_EXCEEDED"
    assert about.calls == 1


@pytest.mark.parametrize("method", ["load", "unload"])
def test_what_changes_the_server_is_sent_once(serve, refusing, method):
    change = refusing(None)
    with Client(serve(**{f"RepositoryModel{method.title()}": change})) as client:
        assert refusal(getattr(client, method), "tiny")[0] == "UNAVAILABLE"
    assert change.calls == 1


def test_storm_of_refusals_does_not_become_a_storm_of_attempts(serve, refusing, model):
    about = refusing(model.about, pushback=1)
    with Client(serve(ModelMetadata=about)) as client:
        for _ in range(100):
            refusal(client.metadata, "tiny")
    assert 100 < about.calls <= 100 + 50  # half of the hundred tokens; without them it were 500


# Who asks, and whom


def test_token_goes_with_every_call(serve, model, tiny):
    tokens = []

    def noted(method):
        def call(request, context):
            tokens.append(dict(context.invocation_metadata()).get("authorization"))
            return method(request, context)

        return call

    methods = {name: noted(method) for name, method in model.methods().items()}
    with Client(serve(**methods), token="a.b-c", coalesce_rows=2) as client:  # joined, alone, parts
        for rows in (1, 2, 20):
            client.predict(tiny.images(rows), model="tiny")

    assert tokens == ["Bearer a.b-c"] * len(tokens)
    assert len(tokens) == 7


def self_signed():
    """Make (key, certificate) in PEM for 127.0.0.1, which only itself vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
        certificate.public_bytes(pem),
    )


@pytest.mark.parametrize("mutual", [False, True])
def test_tls_server_is_asked_with_the_right_certificates_only(serve, model, tiny, tmp_path, mutual):
    key, certificate = self_signed()
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], certificate if mutual else None, require_client_auth=mutual
    )
    address = serve(credentials=credentials, **model.methods())
    (tmp_path / "ca.pem").write_bytes(certificate)

    right = Tls(ca=tmp_path / "ca.pem", certificate=certificate, key=key)
    with Client(address, tls=right) as client:
        assert client.predict(tiny.images(1), model="tiny").version == "1"
    with Client(address, tls=Tls(ca=self_signed()[1])) as client:
        assert refusal(client.models) == (
            "UNAVAILABLE",
            f"no TLS connection to {address}; compare its certificate with tls",
        )
    closed = f"{address} closes every connection at once; if it speaks TLS, give tls"
    with Client(address, tls=Tls(ca=certificate) if mutual else None) as client:
        assert closed in refusal(client.models)[1]
