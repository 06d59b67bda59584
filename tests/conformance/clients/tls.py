"""tritonclient.grpc on a server with TLS that wants a certificate of its clients."""

from tritonclient.grpc import InferenceServerClient

from tests.conformance.clients.asked import MODEL, WAIT_S, refused


def certificates_of_both_sides_open_the_connection(asked):
    with InferenceServerClient(
        asked.address,
        ssl=True,
        root_certificates=asked.authority,
        private_key=asked.key,
        certificate_chain=asked.certificate,
    ) as client:
        assert client.is_server_ready()
        asked.check(client.infer(MODEL, asked.inputs()))


def clients_without_the_right_certificates_do_not_get_in(asked):
    for options in (
        {},
        {"ssl": True},
        {"ssl": True, "root_certificates": asked.authority},
    ):
        with (
            InferenceServerClient(asked.address, **options) as client,
            refused("UNAVAILABLE"),
        ):
            client.is_server_live(client_timeout=WAIT_S)
