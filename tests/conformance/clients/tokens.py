"""tritonclient.grpc on a server that wants a token for every call."""

import asyncio
import queue
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import InferenceServerClientPlugin, aio
from tritonclient.grpc.auth import BasicAuth

from tests.conformance.clients.asked import MODEL, WAIT_S, refused


class Bearer(InferenceServerClientPlugin):
    """Put a token into the headers of every call, as tritonclient's users do."""

    def __init__(self, token):
        self._token = token

    def __call__(self, request):
        request.headers["authorization"] = f"Bearer {self._token}"


def calls_without_a_token_are_refused(asked):
    with asked.client() as client:
        for call in (
            client.is_server_ready,
            client.get_server_metadata,
            client.get_model_repository_index,
            lambda: client.get_model_config(MODEL),
            lambda: client.infer(MODEL, asked.inputs(0, 1)),
            lambda: client.infer(
                MODEL, asked.inputs(0, 1), headers={"authorization": "Bearer wrong"}
            ),
        ):
            with refused("UNAUTHENTICATED"):
                call()
        client.register_plugin(BasicAuth("user", asked.token))
        with refused("UNAUTHENTICATED"):
            client.get_server_metadata()


def health_probes_need_no_token(asked):
    with grpc.insecure_channel(asked.address) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def models_are_loaded_by_nobody_but_the_admin_and_not_while_the_folder_is_polled(asked):
    with asked.client() as client:
        for call in (client.load_model, client.unload_model):
            with refused("PERMISSION_DENIED"):
                call(MODEL, headers={"authorization": f"Bearer {asked.token}"})
            with refused("UNAVAILABLE", "explicit model load / unload is not allowed"):
                call(MODEL, headers=asked.admin)
        assert client.is_model_ready(MODEL, headers=asked.admin)


def token_in_the_headers_opens_every_call(asked):
    headers = {"authorization": f"Bearer {asked.token}"}
    with asked.client() as client:
        assert client.is_server_ready(headers=headers)
        assert client.get_model_metadata(MODEL, headers=headers).name == MODEL
        assert client.get_inference_statistics(MODEL, headers=headers).model_stats
        asked.check(client.infer(MODEL, asked.inputs(0, 3), headers=headers), 0, 3)


def token_of_a_plugin_opens_every_call(asked):
    with asked.client() as client:
        client.register_plugin(Bearer(asked.token))
        assert client.is_model_ready(MODEL)
        asked.check(client.infer(MODEL, asked.inputs(0, 3)), 0, 3)


def token_opens_a_stream_and_without_it_there_is_none(asked):
    answers: queue.Queue[Any] = queue.Queue()
    with asked.client() as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        _, error = answers.get(timeout=WAIT_S)
        assert error.status() == "StatusCode.UNAUTHENTICATED", error
        client.stop_stream()

        client.start_stream(
            lambda result, error: answers.put((result, error)),
            headers={"authorization": f"Bearer {asked.token}"},
        )
        client.async_stream_infer(MODEL, asked.inputs(0, 2))
        client.stop_stream()
        asked.check(answers.get_nowait()[0], 0, 2)


def token_opens_the_asynchronous_client(asked):
    async def ask():
        async with aio.InferenceServerClient(asked.address) as client:
            client.register_plugin(Bearer(asked.token))
            asked.check(await client.infer(MODEL, asked.inputs(0, 3)), 0, 3)

    asyncio.run(ask())
