"""Who may call what: tokens, held against every call of every service before anything is parsed.

Health checks are open, because probes carry no tokens. Loading and unloading needs an admin's
token, and nobody may where there is none. So do the rows that others have sent, on a server that
knows tokens at all.
"""

import hashlib
import hmac
from collections.abc import Collection, Mapping
from pathlib import Path

from service.errors import PermissionDeniedError, SettingsError, UnauthenticatedError

HEADER = "authorization"
SCHEME = "bearer "
OPEN = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch"))
CONTROL = frozenset(
    f"/inference.GRPCInferenceService/RepositoryModel{method}" for method in ("Load", "Unload")
)
ROWS = frozenset(
    f"/train_export.v1.ParityService/{method}" for method in ("SampleTraffic", "ReportShadow")
)
MIN_TOKEN_CHARACTERS = 16  # below it a token can be guessed


class Access:
    """The rules of one server. Keeps digests, not tokens."""

    def __init__(self, tokens: Collection[str], admin_tokens: Collection[str]) -> None:
        """Store who may call.

        Args:
            tokens: may call everything but control and others' rows; none: everybody may.
            admin_tokens: may call everything; none: nobody may control, nor read others' rows
                where there are tokens.
        """
        self._tokens = [_digest(token) for token in tokens]
        self._admin_tokens = [_digest(token) for token in admin_tokens]

    @property
    def wants_tokens(self) -> bool:
        """Whether a call may need one; if not, all that is refused is control."""
        return bool(self._tokens or self._admin_tokens)

    def check(self, path: str, metadata: Mapping[str, str]) -> None:
        """Let a call pass, or refuse it.

        Args:
            path: full path of the RPC, whether or not there is one.
            metadata: of the call, by lower-case names.

        Raises:
            UnauthenticatedError: it has no token, or one that is not known.
            PermissionDeniedError: its token does not allow this call, or none does.
        """
        if path in OPEN:
            return
        control = path in CONTROL or (path in ROWS and self.wants_tokens)
        if control and not self._admin_tokens:
            raise PermissionDeniedError(
                f"{_task(path)} needs an admin's token, and this server knows none; "
                "start it with --admin-token-file"
            )
        if not control and not self._tokens:
            return
        value = metadata.get(HEADER, "")
        if value[: len(SCHEME)].lower() != SCHEME:
            raise UnauthenticatedError(
                f"this server wants the metadata '{HEADER}: Bearer TOKEN', found none"
            )
        digest = _digest(value[len(SCHEME) :].strip())
        if _among(digest, self._admin_tokens):
            return
        if not _among(digest, self._tokens):
            raise UnauthenticatedError("the token is not one that this server knows")
        if control:
            raise PermissionDeniedError(f"{_task(path)} needs an admin's token")


def read_tokens(path: Path | None, variable: str = "") -> list[str]:
    """Return the tokens of a file, one a line, and of an environment variable's value.

    Raises:
        SettingsError: the file cannot be read or has none, or a token is too short.
    """
    tokens = [variable] if variable else []
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"token file {path} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise SettingsError(f"token file {path} has no token; expected one a line")
        tokens += found
    if any(len(token) < MIN_TOKEN_CHARACTERS for token in tokens):
        raise SettingsError(
            f"a token has fewer than {MIN_TOKEN_CHARACTERS} characters; "
            "make one with: openssl rand -hex 32"
        )
    return tokens


def _task(path: str) -> str:
    return "what a shadow does" if path in ROWS else "loading and unloading"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _among(digest: bytes, known: Collection[bytes]) -> bool:
    """Compare with every one, so that the time taken tells nothing."""
    return sum(hmac.compare_digest(digest, other) for other in known) > 0
