import datetime
import os
import resource
import socket
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

import service
from service import doctor, host
from service.doctor import EXAMINATIONS, Finding
from service.settings import Settings

TOKEN = "0123456789abcdef0123456789abcdef"
PEM = serialization.Encoding.PEM


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [one for one in os.environ if one.startswith(("OTEL_", "SERVE_EXPORT_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def examine(tmp_path):
    """Return a function that examines this host, and what it found in one area."""

    def examine(area: str, root: Path = host.ROOT, **options) -> list[Finding]:
        given = {"repository": tmp_path / "models", "address": "127.0.0.1:0", **options}
        findings = doctor.examine(Settings(**given), root)
        return [one for one in findings if one.area == area]

    return examine


def write(root: Path, **files: str) -> Path:
    """Make a host's root of what `cpuinfo`, `cpu_max` and so on say."""
    places = {
        "cpuinfo": "proc/cpuinfo",
        "meminfo": "proc/meminfo",
        "cpu_max": "sys/fs/cgroup/cpu.max",
        "memory_max": "sys/fs/cgroup/memory.max",
        "cgroup": "proc/self/cgroup",
    }
    for name, content in {"cgroup": "0::/\n", **files}.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_everything_is_examined_and_nothing_is_wrong_with_a_good_server(tmp_path, make_bundle):
    make_bundle()
    settings = Settings(
        repository=tmp_path / "models",
        address="127.0.0.1:0",
        metrics_address="127.0.0.1:0",
        instances=1,
        threads=1,
    )
    findings = doctor.examine(settings)

    assert [one for one in findings if not one.ok] == []
    areas = [one.area for one in findings]
    assert {*EXAMINATIONS} - {*areas} == {"TLS client authority", "repository"}
    assert {"tiny", "tiny 1"} <= {*areas}


def test_examination_that_fails_is_a_finding_and_the_others_go_on(examine, tmp_path):
    nothing = tmp_path / ("x" * 300)  # no file can have that name

    (found,) = examine("repository", repository=nothing)
    assert not found.ok
    assert "File name too long" in found.found
    (found,) = examine("TLS", tls_cert=nothing, tls_key=nothing)
    assert not found.ok
    assert "File name too long" in found.found


def test_whatever_is_raised_is_a_finding(monkeypatch, examine):
    def broken(area, settings, root):
        raise ZeroDivisionError("by nothing")
        yield

    monkeypatch.setitem(EXAMINATIONS, "cores", broken)

    (found,) = examine("cores")
    assert found.found == "cannot be examined: by nothing"
    assert not found.ok
    assert examine("processor")[0].ok


@pytest.mark.parametrize(
    ("quota", "text"), [("max 100000", "no quota"), ("150000 100000", "1.5 by the cgroup's quota")]
)
def test_cores_are_told_by_affinity_and_by_quota(examine, tmp_path, quota, text):
    (found,) = examine("cores", write(tmp_path, cpu_max=quota))

    assert found.found == f"{host.affinity()} by affinity, {text}"


def test_memory_is_told_with_its_limit(examine, tmp_path):
    root = write(tmp_path, meminfo="MemTotal: 8388608 kB\n", memory_max="1610612736\n")

    (found,) = examine("memory", root)
    assert found.found == "8.0 GiB in the machine, 1.5 GiB by the cgroup's limit"
    (found,) = examine("memory", write(tmp_path, memory_max="max\n"))
    assert found.found == "8.0 GiB in the machine, no limit"


@pytest.mark.parametrize(
    ("flags", "told", "saturates"),
    [
        ("fpu avx2", "avx2", True),
        ("avx2 avx512f", "avx2 avx512f", True),
        ("avx2 avx512f avx512_vnni", "avx2 avx512f avx512_vnni", False),
        ("avx2 avx_vnni", "avx2 avx_vnni", False),
        ("fp asimddp", "none of avx2 avx512f avx512_vnni avx_vnni amx_int8", False),  # ARM
    ],
)
def test_processor_is_told_with_what_int8_does_on_it(examine, tmp_path, flags, told, saturates):
    root = write(tmp_path, cpuinfo=f"model name\t: Some CPU\nflags\t: {flags}\n")

    (found,) = examine("processor", root)
    assert (found.found, found.ok) == (f"Some CPU, {told}", True)
    assert found.advice.startswith("without VNNI") == saturates


def test_runtime_is_told_with_its_providers(examine):
    (found,) = examine("onnxruntime")

    assert found.ok
    assert found.found.startswith("onnxruntime 1.")
    assert "CPUExecutionProvider" in found.found


def test_provider_that_is_asked_for_and_missing_is_named(examine):
    from service.session import available_providers

    if "CUDAExecutionProvider" in available_providers():
        pytest.skip("it is not missing here")
    (found,) = examine("onnxruntime", providers="cuda,cpu")

    assert not found.ok
    assert found.advice.startswith("CUDAExecutionProvider is asked for; install the extra gpu")


def test_runtime_that_is_not_installed_is_told_and_the_rest_examined(monkeypatch, examine):
    monkeypatch.delitem(sys.modules, "service.session", raising=False)
    monkeypatch.delattr(service, "session", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    (found,) = examine("onnxruntime")
    assert not found.ok
    assert found.advice == "pip install 'train-export[service]', or 'train-export[gpu]'"
    assert examine("address")[0].ok


@pytest.mark.parametrize(
    ("options", "found", "ok"),
    [
        ({"instances": 1, "threads": 1}, "workers 1, instances 1, threads 1: up to 1 busy", True),
        ({"instances": 3, "threads": 2}, "workers 1, instances 3, threads 2: up to 6 busy", False),
        ({"threads": 1, "workers": 2}, "workers 2, instances 1, threads 1: up to 2 busy", False),
        ({}, "workers 1, instances 1, threads 1: up to 1 busy threads a model, on 1 cores", True),
    ],
)
def test_calls_that_would_take_more_cores_than_there_are_are_told(
    examine, tmp_path, options, found, ok
):
    (one,) = examine("calls", write(tmp_path, cpu_max="100000 100000"), **options)

    assert one.found.startswith(found)
    assert one.ok is ok
    assert bool(one.advice) is not ok


def test_front_is_told_with_its_reason_and_one_that_cannot_be_had_is_to_be_mended(examine):
    (local,) = examine("front")
    (reached,) = examine("front", address="0.0.0.0:0")
    (wrong,) = examine("front", front="native", max_connection_age_s=9.0)

    assert local.found == "native, because only this host reaches 127.0.0.1:0; 1 I/O thread"
    assert reached.found == "grpcio, because others than this host reach 0.0.0.0:0"
    assert (wrong.ok, wrong.found) == (
        False,
        "front is 'native', but it does not limit a connection's age; choose auto or grpcio",
    )


def test_io_threads_are_told_with_what_speaks_against_them(examine, monkeypatch):
    cpu = str(min(host.cpus()))
    monkeypatch.setattr(host, "cores", lambda *_: 2)
    (good,) = examine("front", io_threads=2, io_cpus=cpu)
    (shared,) = examine("front", io_threads=2, io_cpus=cpu, workers=2)
    (ignored,) = examine("front", io_threads=2, front="grpcio")
    monkeypatch.setattr(host, "cores", lambda *_: 4)
    (many,) = examine("front", io_threads=2)

    assert good.found.endswith(f"; 2 I/O threads on CPU {cpu}")
    assert good.advice == ""
    assert shared.advice.startswith("the I/O threads of all 2 workers share what io_cpus lists:")
    assert ignored.advice == "io_threads and io_cpus are ignored: the grpcio front serves"
    assert many.advice == "several io_threads cost answers on 4 cores and more"
    assert all(found.ok for found in (good, shared, ignored, many))


@pytest.mark.parametrize("option", ["address", "metrics_address"])
def test_address_that_is_in_use_is_told(examine, option):
    area, flag = option.replace("_", " "), f"--{option.replace('_', '-')}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (found,) = examine(area, **{option: address})
        assert not found.ok
        assert found.found == f"{address} cannot be taken: Address already in use"
        assert found.advice == f"stop what listens there, or choose another with {flag}"

    (found,) = examine(area, **{option: address})
    assert (found.found, found.ok) == (f"{address} can be taken", True)


def test_address_that_is_none_is_told(examine):
    (found,) = examine("metrics address", metrics_address="8002")

    assert not found.ok
    assert found.found.startswith("--metrics-address is '8002', expected HOST:PORT")
    assert examine("metrics address", metrics_address="")[0].found == "none"
    assert examine("address", address="unix:/run/x")[0].found == "unix:/run/x, not tried"


def test_address_of_another_machine_is_told(examine):
    (found,) = examine("address", address="192.0.2.1:1")

    assert not found.ok
    assert found.found.startswith("192.0.2.1:1 cannot be taken: ")


@pytest.fixture
def certificate(tmp_path):
    """Return a function that writes a certificate and its key that end in so many days."""

    def make(days: float) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = datetime.datetime.now(datetime.UTC)
        signed = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, SHA256())
        )
        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files = tmp_path / "tls.pem", tmp_path / "tls.key"
        files[0].write_bytes(signed.public_bytes(PEM))
        files[1].write_bytes(key.private_bytes(PEM, form, plain))
        files[1].chmod(0o600)
        return files

    return make


@pytest.mark.parametrize(("days", "ok"), [(6.9, False), (7.1, True)])
def test_certificate_that_ends_soon_is_to_be_renewed(examine, certificate, days, ok):
    cert, key = certificate(days)
    options = {"tls_cert": cert, "tls_key": key, "tls_client_ca": cert}

    for area in ("TLS", "TLS client authority"):
        (found,) = examine(area, **options)
        assert found.ok is ok
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        assert f"{ends:%Y-%m-%d}" in found.found
        assert bool(found.advice) is not ok


def test_certificate_that_has_ended_is_told(examine, certificate):
    cert, key = certificate(-1)

    (found,) = examine("TLS", tls_cert=cert, tls_key=key)
    assert not found.ok
    assert "certificate has expired" in found.found


def test_key_that_everybody_can_read_is_told(examine, certificate):
    cert, key = certificate(30)
    key.chmod(0o604)

    assert [one.ok for one in examine("TLS", tls_cert=cert, tls_key=key)] == [True]
    (found,) = examine("private key", tls_cert=cert, tls_key=key)
    assert not found.ok
    assert found.advice.endswith(f"chmod o= {key}")


def test_server_without_tls_is_told_what_that_means(examine):
    assert examine("TLS") == [
        Finding("TLS", "none", "what is asked and answered can be read on its way")
    ]


@pytest.mark.parametrize(
    ("area", "option"), [("tokens", "token_file"), ("admin tokens", "admin_token_file")]
)
def test_tokens_are_counted_and_kept_from_others(examine, tmp_path, area, option):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n\n{TOKEN[::-1]}\n")
    file.chmod(0o640)
    assert examine(area, **{option: file}) == [Finding(area, "2")]

    file.chmod(0o644)
    counted, shown = examine(area, **{option: file})
    assert counted.ok
    assert not shown.ok
    assert shown.found == f"{file} can be read by everybody on this host"
    assert TOKEN not in f"{counted}{shown}"

    file.write_text("short\n")
    (found,) = examine(area, **{option: file})
    assert not found.ok
    assert "short" not in found.found
    (found,) = examine(area, **{option: tmp_path / "not-there"})
    assert not found.ok


def test_control_without_a_token_for_it_is_told(examine, monkeypatch):
    assert examine("admin tokens")[0].ok
    (found,) = examine("admin tokens", model_control="explicit")
    assert (found.found, found.advice, found.ok) == ("0", "nobody can load or unload models", False)

    monkeypatch.setenv("SERVE_EXPORT_ADMIN_TOKEN", TOKEN)
    assert examine("admin tokens", model_control="explicit") == [Finding("admin tokens", "1")]


def test_repository_is_told_version_by_version_with_the_one_that_would_answer(examine, make_bundle):
    for version in (1, 2):
        make_bundle(version=version)
    path = make_bundle(version=3)
    (path / "model.onnx").write_bytes(b"changed")

    assert [one.ok for one in examine("tiny 1") + examine("tiny 2")] == [True, True]
    (found,) = examine("tiny 3")
    assert not found.ok
    assert "tiny/3/model.onnx has 7 bytes" in found.found
    assert examine("tiny") == [Finding("tiny", "version 2 would answer")]
    assert examine("tiny", version_policy="specific:1,3")[0].found == "version 1 would answer"
    (path.parent / "config.pbtxt").write_text("version_policy { specific { versions: 1 } }")
    assert examine("tiny")[0].found == "version 1 would answer"


def test_champion_would_answer_if_it_is_whole(examine, make_bundle):
    folder = make_bundle(version=1).parent
    whole = make_bundle(version=2)
    (folder / "aliases.json").write_text('{"champion": 1, "candidate": 2}')
    pointers = "candidate is 2, champion is 1"
    assert examine("tiny")[0].found == f"version 1 would answer; {pointers}"

    (folder / "1" / "golden.npz").unlink()
    (found,) = examine("tiny")
    assert not found.ok
    assert found.found == f"its champion, 1, cannot answer; {pointers}"
    assert found.advice == "publish it again, or: serve-export alias tiny champion VERSION"
    (folder / "aliases.json").write_text("{}")
    assert examine("tiny")[0].found == "version 2 would answer"
    (whole / "golden.npz").unlink()
    assert examine("tiny")[0].found == "no version would answer"


@pytest.mark.parametrize(
    ("name", "content"), [("aliases.json", "[]"), ("config.pbtxt", "no config")]
)
def test_file_that_keeps_a_model_from_being_loaded_is_told(examine, make_bundle, name, content):
    (make_bundle().parent / name).write_text(content)

    (found,) = examine("tiny")
    assert not found.ok
    assert f"tiny/{name} is not" in found.found


def test_repository_without_bundles_is_told(examine, tmp_path):
    (tmp_path / "models").mkdir()

    (found,) = examine("repository")
    assert not found.ok
    assert found.advice == "publish a model with: train-export run"


@pytest.mark.parametrize(("limit", "ok"), [(1023, False), (1024, True)])
def test_few_open_files_are_told(examine, limit, ok):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        (found,) = examine("open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert found.found.startswith(f"{limit} at most")
    assert found.ok is ok


def test_traces_that_are_asked_for_and_cannot_be_sent_are_told(examine, monkeypatch):
    assert examine("traces") == [
        Finding("traces", "not asked for, the extra telemetry is installed")
    ]
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    assert examine("traces")[0].ok

    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    (found,) = examine("traces")
    assert not found.ok
    assert found.found == "OTEL_TRACES_EXPORTER asks for them, the extra telemetry is not installed"
    assert found.advice == "pip install 'train-export[telemetry]'"
