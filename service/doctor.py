"""What `serve-export doctor` finds: this host, these settings, this repository.

Everything is examined, whatever was found before; nothing is changed, and no model is run.
"""

import importlib.util
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service import access, aliases, bundle, host, model_config, tls, tracing
from service.command_line import size
from service.errors import BundleError, ServiceError
from service.front.address import resolve
from service.front.choice import choose, io_advice, io_shown
from service.model_config import ModelOptions
from service.settings import ENVIRONMENT_PREFIX, PROVIDERS, Settings

VNNI_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")
USEFUL_FLAGS = ("avx2", "avx512f", *VNNI_FLAGS)
MIN_OPEN_FILES = 1024  # Linux' usual limit; each connection takes one
SOON_S = 7 * 86_400  # a certificate that ends within it should have been renewed


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    found: str
    advice: str = ""  # what to do, or what follows from it
    ok: bool = True


def examine(settings: Settings, root: Path = host.ROOT) -> list[Finding]:
    """Look at everything that decides how a server with these settings would do here.

    Args:
        settings: of that server.
        root: above `proc` and `sys`.

    Returns:
        What was found, by area; what is not `ok` keeps the server, or a version, from working as
        it should. Never raises.
    """
    findings: list[Finding] = []
    for area, look in EXAMINATIONS.items():
        try:
            findings += look(area, settings, root)
        except ServiceError as error:  # a sentence that says what to do
            findings.append(Finding(area, str(error), ok=False))
        except Exception as error:  # noqa: BLE001  that it cannot be examined is a finding too
            advice = "look whether this user may read it, and whether everything is installed"
            findings.append(Finding(area, f"cannot be examined: {error}", advice, ok=False))
    return findings


def _cores(area: str, _: Settings, root: Path) -> Iterator[Finding]:
    quota = host.quota(root)
    limit = "no quota" if quota is None else f"{quota:g} by the cgroup's quota"
    yield Finding(area, f"{host.affinity()} by affinity, {limit}")


def _memory(area: str, _: Settings, root: Path) -> Iterator[Finding]:
    limit, whole = host.memory_limit_bytes(root), host.memory_bytes(root)
    allowed = "no limit" if limit is None else f"{size(limit)} by the cgroup's limit"
    yield Finding(area, f"{size(whole or 0)} in the machine, {allowed}")


def _processor(area: str, _: Settings, root: Path) -> Iterator[Finding]:
    found = host.processor(root)
    useful = " ".join(flag for flag in USEFUL_FLAGS if flag in found.flags)
    yield Finding(
        area,
        f"{found.name}, {useful or 'none of ' + ' '.join(USEFUL_FLAGS)}",
        "without VNNI, products of int8 saturate: such a model may answer otherwise than where it "
        "was made, and the self-check refuses it then; float32 is not concerned"
        if "avx2" in found.flags and not found.flags & {*VNNI_FLAGS}
        else "",
    )


def _runtime(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    try:
        from service import session  # noqa: PLC0415  that it is missing must not stop the rest
    except ImportError as error:
        advice = "pip install 'train-export[service]', or 'train-export[gpu]'"
        yield Finding(area, f"cannot be imported: {error}", advice, ok=False)
        return
    there = session.available_providers()
    asked = [PROVIDERS[name] for name in settings.providers.split(",")]
    missing = ", ".join(name for name in asked if name not in there)
    yield Finding(
        area,
        f"{session.RUNTIME} with {', '.join(there)}",
        f"{missing} is asked for; install the extra gpu instead of service, or change --providers"
        if missing
        else "",
        ok=not missing,
    )


def _calls(area: str, settings: Settings, root: Path) -> Iterator[Finding]:
    cores = host.cores(root)
    options = model_config.of_server(settings, cores)
    busy = options.instances * options.threads * settings.workers
    yield Finding(
        area,
        f"workers {settings.workers}, instances {options.instances}, threads {options.threads}: "
        f"up to {busy} busy threads a model, on {cores} cores",
        "they would wait for each other; choose --workers, --instances and --threads so that "
        f"their product is at most {cores}"
        if busy > cores
        else "",
        ok=busy <= cores,
    )


def _address(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    flag = f"--{area.replace(' ', '-')}"
    address = getattr(settings, area.replace(" ", "_"))
    if not address or address.startswith("unix:"):
        yield Finding(area, f"{address}, not tried" if address else "none")
        return
    family, place = resolve(address, flag)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
    except OSError as error:
        advice = f"stop what listens there, or choose another with {flag}"
        yield Finding(area, f"{address} cannot be taken: {error.strerror}", advice, ok=False)
    else:
        yield Finding(area, f"{address} can be taken")


def _certificate(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    if settings.tls_cert is None or settings.tls_key is None:
        yield Finding(area, "none", "what is asked and answered can be read on its way")
        return
    ends_s = tls.certificate_ends_s(settings.tls_cert, settings.tls_key)
    yield _ends(area, settings.tls_cert, ends_s)
    yield from _secret("private key", settings.tls_key)


def _authority(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    if settings.tls_client_ca is not None:
        ends_s = tls.authorities_end_s(settings.tls_client_ca)
        yield _ends(area, settings.tls_client_ca, ends_s)


def _ends(area: str, path: Path, ends_s: float) -> Finding:
    left_s = ends_s - time.time()
    when = time.strftime("%Y-%m-%d", time.gmtime(ends_s))
    if left_s > SOON_S:
        return Finding(area, f"{path} can be used until {when}")
    return Finding(area, f"{path} ends on {when}", "renew it, and start the server again", ok=False)


def _tokens(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    admin = area != "tokens"
    path = settings.admin_token_file if admin else settings.token_file
    variable = f"{ENVIRONMENT_PREFIX}{'ADMIN_' if admin else ''}TOKEN"
    tokens = access.read_tokens(path, os.environ.get(variable, ""))
    open_to = "nobody can load or unload models" if admin else "everybody can ask"
    needed = admin and settings.model_control == "explicit"
    yield Finding(area, str(len(tokens)), "" if tokens else open_to, ok=bool(tokens) or not needed)
    if path is not None:
        yield from _secret(area, path)


def _secret(area: str, path: Path) -> Iterator[Finding]:
    if path.stat().st_mode & stat.S_IROTH:
        advice = f"take that from others: chmod o= {path}"
        yield Finding(area, f"{path} can be read by everybody on this host", advice, ok=False)


def _repository(area: str, settings: Settings, root: Path) -> Iterator[Finding]:
    if isinstance(settings.repository, Path):
        yield from _bundles(area, settings, root, settings.repository)
        return
    from service import mirror, remote  # noqa: PLC0415  only for who has a URL

    url, copies = settings.repository, mirror.folder_of(settings)
    found = mirror.published(remote.connect(url).list())
    versions = sum(map(len, found.values()))
    advice = "" if found else f"publish into it with: train-export push NAME VERSION --to {url}"
    yield Finding(area, f"{url} answers, with {versions} versions", advice, ok=bool(found))
    if copies.is_dir():
        yield from _bundles("copies", settings, root, copies)
    else:
        yield Finding("copies", f"{copies} is not there yet", "a server that starts makes it")


def _bundles(area: str, settings: Settings, root: Path, folder: Path) -> Iterator[Finding]:
    from service.repository import scan  # noqa: PLC0415  needs onnxruntime

    found = scan(folder)
    if not found:
        advice = "publish a model with: train-export run"
        yield Finding(area, f"{folder} holds no bundle", advice, ok=False)
    defaults = model_config.of_server(settings, host.cores(root))
    for name, versions in sorted(found.items()):
        if versions is None:
            yield Finding(name, "its folder cannot be read", "change its owner or mode", ok=False)
            continue
        verified = []
        for number, path in sorted(versions.items()):
            try:
                files = bundle.read(path).manifest.files
            except BundleError as error:
                yield Finding(f"{name} {number}", str(error), ok=False)
            else:
                verified.append(number)
                whole = size(sum(file.size_bytes for file in files))
                yield Finding(f"{name} {number}", f"{len(files)} files verified, {whole}")
        yield _answering(name, folder / name, verified, defaults)


def _answering(name: str, folder: Path, verified: list[int], defaults: ModelOptions) -> Finding:
    """Say which version would answer, were it to pass its self-check."""
    try:
        policy = model_config.read(folder, defaults).policy
        named = aliases.read(folder)
    except BundleError as error:
        return Finding(name, str(error), "none of its versions would be loaded", ok=False)
    chosen = policy.choose(verified)[: policy.latest or None]
    ready = {*chosen, *(number for number in named.values() if number in verified)}
    champion = named.get(aliases.CHAMPION)
    pointers = ", ".join(f"{alias} is {number}" for alias, number in sorted(named.items()))
    shown = f"; {pointers}" if pointers else ""
    if champion is not None and champion not in ready:
        advice = f"publish it again, or: serve-export alias {name} champion VERSION"
        return Finding(name, f"its champion, {champion}, cannot answer{shown}", advice, ok=False)
    if not ready:
        return Finding(name, f"no version would answer{shown}", "publish one", ok=False)
    return Finding(name, f"version {champion or max(ready)} would answer{shown}")


def _open_files(area: str, _: Settings, __: Path) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES
    advice = f"each connection takes one; raise it: ulimit -n {MIN_OPEN_FILES}" if few else ""
    yield Finding(area, f"{soft} at most, can be raised to {hard}", advice, ok=not few)


def _telemetry(area: str, _: Settings, __: Path) -> Iterator[Finding]:
    asked = tracing.asked_by(os.environ)
    wanted = f"{asked} asks for them" if asked else "not asked for"
    try:
        installed = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None
    except ImportError:  # of a package above it
        installed = False
    there = "installed" if installed else "not installed"
    missing = bool(asked) and not installed
    advice = "pip install 'train-export[telemetry]'" if missing else ""
    yield Finding(area, f"{wanted}, the extra telemetry is {there}", advice, ok=not missing)


def _front(area: str, settings: Settings, _: Path) -> Iterator[Finding]:
    chosen = choose(settings)
    carried = f"; {io_shown(settings)}" if chosen.front == "native" else ""
    found = f"{chosen.front}, because {chosen.reason}{carried}"
    yield Finding(area, found, io_advice(settings, chosen.front))


EXAMINATIONS: dict[str, Callable[[str, Settings, Path], Iterator[Finding]]] = {
    "cores": _cores,
    "memory": _memory,
    "processor": _processor,
    "onnxruntime": _runtime,
    "calls": _calls,
    "address": _address,
    "front": _front,
    "metrics address": _address,
    "TLS": _certificate,
    "TLS client authority": _authority,
    "tokens": _tokens,
    "admin tokens": _tokens,
    "repository": _repository,
    "open files": _open_files,
    "traces": _telemetry,
}
