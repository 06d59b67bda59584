"""NVIDIA's Python client, unmodified, against the real server."""

import pytest

FRONTS = ("grpcio", "native")
pytestmark = pytest.mark.slow

CONTROL = ("--model-control", "explicit")


def test_tritonclient_is_answered_like_by_triton(serve, ask):
    ask("sync", serve())


def test_asynchronous_tritonclient_is_answered_so_where_requests_wait_by_priority(serve, ask):
    ask("aio", serve("--priority-levels", "2", "--max-queue-delay-ms", "1"))


def test_streams_of_tritonclient_are_answered_in_order_and_outlive_refusals(serve, ask):
    ask("stream", serve())


def test_statistics_agree_with_what_tritonclient_sent(serve, ask):
    ask("statistics", serve())


def test_tritonclient_loads_and_unloads_models_with_the_admin_s_token(serve, ask, token_files):
    ask("control", serve(*CONTROL, "--admin-token-file", token_files[1]))


def test_tritonclient_brings_a_token_where_one_is_wanted(serve, ask, token_files):
    ask("tokens", serve("--token-file", token_files[0], "--admin-token-file", token_files[1]))


@pytest.mark.only_grpcio("no TLS")
def test_tritonclient_and_server_know_each_other_by_certificates(serve, ask, certificates):
    server = serve(
        *("--tls-cert", str(certificates.server), "--tls-key", str(certificates.key)),
        *("--tls-client-ca", str(certificates.authority)),
        authority=str(certificates.authority),
        certificate=str(certificates.client),
        key=str(certificates.key),
    )

    ask("tls", server)


@pytest.mark.parametrize("first_is_ours", [True, False])
def test_our_client_and_tritonclient_work_in_one_process(serve, ask_in_one_process, first_is_ours):
    modules = ["service.client", "tritonclient.grpc"]

    ask_in_one_process(serve(), *modules if first_is_ours else reversed(modules))
