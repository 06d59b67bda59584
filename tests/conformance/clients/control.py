"""tritonclient.grpc loads and unloads models, on a server that has none loaded."""

import json

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conformance.clients.asked import MODEL, WAIT_S, check_refusal, refused

READY = "READY"


def states(client):
    return {
        (model.name, model.version): model.state
        for model in client.get_model_repository_index().models
    }


def nothing_is_loaded_that_nobody_asked_for(asked):
    with asked.client() as client:
        assert client.is_server_live()
        assert not client.is_model_ready(MODEL)
        assert MODEL in {model.name for model in client.get_model_repository_index().models}
        assert READY not in states(client).values()


def control_needs_the_admin_s_token(asked):
    with asked.client() as client:
        for call in (client.load_model, client.unload_model):
            for headers in (None, {"authorization": f"Bearer {asked.token}"}):
                with refused("UNAUTHENTICATED"):
                    call(MODEL, headers=headers)
        assert not client.is_model_ready(MODEL)


def model_is_loaded_answers_and_is_unloaded(asked):
    with asked.client() as client:
        client.load_model(MODEL, headers=asked.admin)
        assert client.is_model_ready(MODEL)
        assert states(client)[MODEL, "1"] == READY
        asked.check(client.infer(MODEL, asked.inputs(0, 5)), 0, 5)

        client.unload_model(MODEL, headers=asked.admin)
        assert not client.is_model_ready(MODEL)
        assert READY not in states(client).values()
        try:
            client.infer(MODEL, asked.inputs(0, 5))
        except InferenceServerException as error:
            assert error.status() in {"StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE"}, error
        else:
            raise AssertionError("an unloaded model answered")


def config_of_the_request_changes_the_largest_batch(asked):
    with asked.client() as client:
        client.load_model(MODEL, headers=asked.admin, config='{"max_batch_size": "4"}')
        assert client.get_model_config(MODEL).config.max_batch_size == 4
        asked.check(client.infer(MODEL, asked.inputs(0, 4)), 0, 4)
        with refused("INVALID_ARGUMENT", "batch-size must be <= 4"):
            client.infer(MODEL, asked.inputs(0, 5))

        client.load_model(MODEL, headers=asked.admin, config=json.dumps({"max_batch_size": 6}))
        asked.check(client.infer(MODEL, asked.inputs(0, 6)), 0, 6)

        client.load_model(MODEL, headers=asked.admin)
        assert client.get_model_config(MODEL).config.max_batch_size == asked.max_batch_rows
        client.unload_model(MODEL, headers=asked.admin)


def config_that_is_none_is_refused_and_the_loaded_model_stays(asked):
    with asked.client() as client:
        client.load_model(MODEL, headers=asked.admin)
        try:
            wrong = '"parameters": {"config": {{"max_batch_size": "16"}}}'
            client.load_model(MODEL, headers=asked.admin, config=wrong)
        except InferenceServerException as error:
            assert "failed to load" in error.message(), error
        else:
            raise AssertionError("a configuration that is none was accepted")
        asked.check(client.infer(MODEL, asked.inputs(0, 5)), 0, 5)
        client.unload_model(MODEL, headers=asked.admin)


def files_of_a_request_are_refused_without_harm(asked):
    with asked.client() as client:
        client.load_model(MODEL, headers=asked.admin)
        for path in ("file:1/model.onnx", "file:../../outside", "file:" + "A" * 256):
            try:
                client.load_model(
                    MODEL, headers=asked.admin, config="{}", files={path: b"not a model"}
                )
            except InferenceServerException as error:
                refusals = ("StatusCode.INVALID_ARGUMENT", "StatusCode.UNIMPLEMENTED")
                assert error.status() in refusals, error
            else:
                raise AssertionError(f"{path} was accepted")
        assert client.is_server_live()
        asked.check(client.infer(MODEL, asked.inputs(0, 5)), 0, 5)
        client.unload_model(MODEL, headers=asked.admin)


def model_that_is_not_there_fails_to_load(asked):
    with asked.client() as client:
        try:
            client.load_model("nobody", headers=asked.admin)
        except InferenceServerException as error:
            assert "failed to load 'nobody'" in error.message(), error
        else:
            raise AssertionError("a model that is not there was loaded")
        for name in ("../tiny", "tiny/1", ""):
            try:
                client.load_model(name, headers=asked.admin)
            except InferenceServerException as error:
                check_refusal(error, "INVALID_ARGUMENT")
            else:
                raise AssertionError(f"{name} was loaded")


def health_watch_follows_a_model(asked):
    status = health_pb2.HealthCheckResponse
    with asked.client() as client, grpc.insecure_channel(asked.address) as channel:
        client.load_model(MODEL, headers=asked.admin)
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=MODEL), timeout=WAIT_S
        )
        assert next(watch).status == status.SERVING
        client.unload_model(MODEL, headers=asked.admin)
        assert next(watch).status in {status.NOT_SERVING, status.SERVICE_UNKNOWN}
        client.load_model(MODEL, headers=asked.admin)
        assert next(watch).status == status.SERVING
        watch.cancel()
        client.unload_model(MODEL, headers=asked.admin)
