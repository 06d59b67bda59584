"""A real server on the tiny model, and the environment of those who ask it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

ROOT = Path(__file__).parents[2]
STRANGERS = ROOT / ".venv-conformance"
ROWS = 33  # asked about
PICTURES = 6
TOKEN, ADMIN_TOKEN = "a-token-of-a-user", "a-token-of-an-admin"
WAIT_S = 120  # for one module of clients


@pytest.fixture(scope="session")
def strangers() -> Path:
    """Give the environment of clients that nobody here wrote."""
    if not (STRANGERS / ".installed").exists():
        pytest.fail("the clients are not installed; run: make conformance")
    return STRANGERS


@dataclass(frozen=True)
class Server:
    """A server process, and the folder that tells strangers where it is and what it must say."""

    address: str
    folder: Path


@pytest.fixture
def serve(tmp_path: Path, make_bundle, tiny, front_kind) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server on the tiny model with more options."""
    started: list[subprocess.Popen[str]] = []
    models = make_bundle().parents[1]
    log = tmp_path / "server.log"

    def start(*options: str, **asked: str) -> Server:
        command = [sys.executable, "-m", "service", "serve", "--repository", str(models)]
        command += ["--address", "127.0.0.1:0", "--server-name", "triton"]
        command += ["--front", front_kind, *options]
        with log.open("w") as stderr:
            popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        started.append(popen)
        line = popen.stdout.readline()
        assert line.startswith("serving on "), log.read_text()
        address = line.removeprefix("serving on ").strip()
        compressions = ["gzip", "deflate"][: 1 + (front_kind == "grpcio")]
        given = {"address": address, "compressions": compressions, **asked}
        return Server(address, write_asked(tmp_path / "asked", tiny, **given))

    yield start
    for popen in started:
        popen.terminate()
        status = popen.wait(60)
        popen.stdout.close()
        assert status == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()


def write_asked(folder: Path, tiny, **asked: str | list[str]) -> Path:
    """Write what tests.conformance.clients.asked reads."""
    (folder / "pictures").mkdir(parents=True)
    images = tiny.images(ROWS)
    np.save(folder / "images.npy", images)
    np.save(folder / "logits.npy", tiny.logits(images))
    for number, image in enumerate(images[:PICTURES]):
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "PNG")
        (folder / "pictures" / f"{number}.png").write_bytes(buffer.getvalue())
    always = {
        "labels": list(tiny.labels),
        "token": TOKEN,
        "admin_token": ADMIN_TOKEN,
        "max_batch_rows": 256,  # the server's default
        **dict.fromkeys(("authority", "certificate", "key"), ""),
    }
    (folder / "asked.json").write_text(json.dumps(always | asked))
    return folder


@pytest.fixture
def token_files(tmp_path: Path) -> tuple[str, str]:
    """Give the files of the users' and of the admins' tokens."""
    paths = tmp_path / "tokens", tmp_path / "admin-tokens"
    for path, token in zip(paths, (TOKEN, ADMIN_TOKEN), strict=True):
        path.write_text(f"{token}\n")
        path.chmod(0o600)
    return str(paths[0]), str(paths[1])


@pytest.fixture
def ask(strangers: Path) -> Callable[[str, Server], None]:
    """Return a function that lets one module of clients ask a server; all of it must pass."""

    def ask(module: str, server: Server) -> None:
        python = str(strangers / "bin/python")
        run([python, "-m", "tests.conformance.clients.run", module, str(server.folder)])

    return ask


@pytest.fixture
def ask_in_one_process(strangers: Path) -> Callable[..., None]:
    """Return a function that imports modules in an order and asks with both clients."""

    def ask(server: Server, *modules: str) -> None:
        (packages,) = strangers.glob("lib/python*/site-packages")
        command = [sys.executable, "-m", "tests.conformance.clients.one_process"]
        run([*command, str(server.folder), str(packages), *modules])

    return ask


def run(command: list[str], **environment: str) -> str:
    """Run a stranger and return what it printed; it must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def perf_analyzer(strangers: Path) -> Callable[..., str]:
    """Return a function that runs perf_analyzer with options and returns what it printed."""

    def measure(server: Server, *options: str) -> str:
        command = [str(strangers / "perf_analyzer/bin/perf_analyzer"), "-m", "tiny"]
        command += ["--service-kind", "triton", "-i", "grpc", "-u", server.address, *options]
        return run(command, LD_LIBRARY_PATH=str(strangers / "lib-perf_analyzer"))

    return measure


@dataclass(frozen=True)
class Certificates:
    """PEM files that an authority signed for a server on 127.0.0.1 and for a client of it."""

    authority: Path
    server: Path
    client: Path
    key: Path  # of both


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    folder = tmp_path / "certificates"
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key").write_bytes(pem)
    for name in ("authority", "server", "client"):
        signed = sign(name, key).public_bytes(serialization.Encoding.PEM)
        (folder / name).write_bytes(signed)
    return Certificates(*(folder / name for name in ("authority", "server", "client", "key")))


def sign(name: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Make a certificate that is good for an hour, with one key for everybody."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
