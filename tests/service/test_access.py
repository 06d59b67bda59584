import pytest

from service.access import CONTROL, OPEN, ROWS, Access, read_tokens
from service.errors import PermissionDeniedError, SettingsError, UnauthenticatedError
from service.rpc import INFER, SAMPLE

TOKEN, OTHER, ADMIN = "a-token-of-a-user", "another-user-s-token", "a-token-of-an-admin"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
UNKNOWN = "/no.such.Service/Method"
NO_TOKEN: dict[str, str] = {}


def bearer(token, scheme="Bearer"):
    return {"authorization": f"{scheme} {token}"}


def check(tokens, admin_tokens, path, metadata):
    """Tell how a call is taken: passed, or the class of its refusal."""
    try:
        Access(tokens, admin_tokens).check(path, metadata)
    except (UnauthenticatedError, PermissionDeniedError) as error:
        return type(error)
    return "passed"


@pytest.mark.parametrize("path", [INFER, UNKNOWN, "", "/grpc.health.v1.Health/Check"])
@pytest.mark.parametrize("metadata", [{}, bearer(TOKEN), bearer("nonsense")])
def test_everybody_may_call_a_server_without_tokens(path, metadata):
    assert check((), (), path, metadata) == "passed"


@pytest.mark.parametrize("path", sorted(CONTROL))
@pytest.mark.parametrize("tokens", [(), (TOKEN,)])
@pytest.mark.parametrize("metadata", [{}, bearer(TOKEN), bearer(ADMIN), bearer("")])
def test_nobody_loads_where_there_is_no_admin(path, tokens, metadata):
    assert check(tokens, (), path, metadata) is PermissionDeniedError


def test_loading_and_unloading_is_what_only_an_admin_may():
    assert {
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/inference.GRPCInferenceService/RepositoryModelUnload",
    } == CONTROL
    assert check((TOKEN,), (ADMIN,), LOAD, bearer(ADMIN)) == "passed"
    assert check((TOKEN,), (ADMIN,), LOAD, bearer(TOKEN)) is PermissionDeniedError
    for metadata in (NO_TOKEN, bearer("nonsense"), bearer("")):
        assert check((TOKEN,), (ADMIN,), LOAD, metadata) is UnauthenticatedError
    assert check((), (ADMIN,), LOAD, {}) is UnauthenticatedError
    assert check((), (ADMIN,), LOAD, bearer(ADMIN)) == "passed"


@pytest.mark.parametrize("path", sorted(ROWS))
def test_rows_that_others_sent_are_what_only_an_admin_may_read_where_there_are_tokens(path):
    assert check((), (), path, {}) == "passed"
    for tokens in ((), (TOKEN,)):
        assert check(tokens, (ADMIN,), path, bearer(ADMIN)) == "passed"
        assert check(tokens, (ADMIN,), path, {}) is UnauthenticatedError
    assert check((TOKEN,), (ADMIN,), path, bearer(TOKEN)) is PermissionDeniedError
    assert check((TOKEN,), (), path, bearer(TOKEN)) is PermissionDeniedError


def test_refusal_says_what_an_admin_s_token_is_needed_for():
    for path, task in ((SAMPLE, "what a shadow does"), (LOAD, "loading and unloading")):
        with pytest.raises(PermissionDeniedError) as caught:
            Access((TOKEN,), (ADMIN,)).check(path, bearer(TOKEN))
        assert str(caught.value) == f"{task} needs an admin's token"
        with pytest.raises(PermissionDeniedError) as caught:
            Access((TOKEN,), ()).check(path, bearer(TOKEN))
        assert str(caught.value).startswith(f"{task} needs an admin's token, and this server knows")


@pytest.mark.parametrize("path", [INFER, UNKNOWN, "", "/", "/grpc.health.v1.Health/check"])
def test_any_call_needs_a_token_where_there_are_some(path):
    tokens = (TOKEN, OTHER)

    for token in (*tokens, ADMIN):
        assert check(tokens, (ADMIN,), path, bearer(token)) == "passed"
    for metadata in (
        NO_TOKEN,
        bearer("nonsense-nonsense"),
        bearer(TOKEN[:-1]),
        bearer(f"{TOKEN}x"),
    ):
        assert check(tokens, (ADMIN,), path, metadata) is UnauthenticatedError


def test_an_admin_s_token_alone_leaves_everything_else_open():
    assert check((), (ADMIN,), INFER, {}) == "passed"


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_is_open_to_probes(path):
    assert path.startswith("/grpc.health.v1.Health/")
    for metadata in (NO_TOKEN, bearer("nonsense")):
        assert check((TOKEN,), (ADMIN,), path, metadata) == "passed"


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {TOKEN}",
        f"bearer {TOKEN}",
        f"BEARER   {TOKEN} ",
    ],
)
def test_scheme_is_read_in_any_case_and_spaces_do_not_count(value):
    assert check((TOKEN,), (), INFER, {"authorization": value}) == "passed"


@pytest.mark.parametrize(
    "metadata",
    [
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer{TOKEN}"},
        {"authorization": "Bearer"},
        {"authorization": ""},
        {"x-authorization": f"Bearer {TOKEN}"},
        {"authorization": "Bearer \udcff"},
    ],
)
def test_what_is_no_bearer_s_token_is_refused(metadata):
    assert check((TOKEN,), (), INFER, metadata) is UnauthenticatedError


def test_refusals_say_what_is_wanted_and_never_what_is_known():
    access = Access((TOKEN,), (ADMIN,))
    said = []
    for path, metadata in ((INFER, {}), (INFER, bearer("nonsense")), (LOAD, bearer(TOKEN))):
        with pytest.raises((UnauthenticatedError, PermissionDeniedError)) as caught:
            access.check(path, metadata)
        said.append(str(caught.value))

    assert said == [
        "this server wants the metadata 'authorization: Bearer TOKEN', found none",
        "the token is not one that this server knows",
        "loading and unloading needs an admin's token",
    ]
    assert TOKEN not in repr(vars(access))
    assert ADMIN not in repr(vars(access))


def test_tokens_are_read_a_line_each_beside_that_of_the_environment(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n\n  {OTHER}  \r\n")

    assert read_tokens(file) == [TOKEN, OTHER]
    assert read_tokens(file, ADMIN) == [ADMIN, TOKEN, OTHER]
    assert read_tokens(None, ADMIN) == [ADMIN]
    assert read_tokens(None) == []


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe-no-text-no-text"])
def test_file_without_a_token_is_refused(tmp_path, content):
    file = tmp_path / "tokens"
    file.write_bytes(content)

    with pytest.raises(SettingsError, match=r"token file .*tokens "):
        read_tokens(file)


def test_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        read_tokens(tmp_path / "none")


def test_token_of_sixteen_characters_is_taken_and_a_shorter_one_is_refused_unsaid(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("x" * 16)
    assert read_tokens(file) == ["x" * 16]

    for arguments in ((None, "secret-but-short"[:15]), (file, "s")):
        with pytest.raises(SettingsError) as caught:
            read_tokens(*arguments)
        assert str(caught.value) == (
            "a token has fewer than 16 characters; make one with: openssl rand -hex 32"
        )
