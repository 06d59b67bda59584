"""tritonclient.grpc, the synchronous client, against a server with the tiny model."""

import queue
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput

from tests.conformance.clients.asked import MODEL, SHAPE, WAIT_S, check_refusal, refused


def server_and_its_model_are_live_and_ready(asked):
    with asked.client() as client:
        assert client.is_server_live(headers={"test": "1", "dummy": "2"})
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        assert client.is_model_ready(MODEL, "1")


def what_is_not_there_is_not_ready_and_no_error(asked):
    with asked.client() as client:
        assert not client.is_model_ready("nobody")
        assert not client.is_model_ready(MODEL, "7")


def server_metadata_has_the_name_that_triton_s_examples_ask_for(asked):
    with asked.client() as client:
        metadata = client.get_server_metadata()
        assert metadata.name == "triton"
        assert metadata.version
        assert {
            "classification",
            "model_repository",
            "model_configuration",
            "binary_tensor_data",
            "parameters",
            "statistics",
        } <= set(metadata.extensions)
        assert not {"system_shared_memory", "cuda_shared_memory", "trace", "sequence"} & set(
            metadata.extensions
        )
        assert client.get_server_metadata(as_json=True)["name"] == "triton"


def model_metadata_describes_every_tensor(asked):
    with asked.client() as client:
        metadata = client.get_model_metadata(MODEL, headers={"test": "1"})
        assert metadata.name == MODEL
        assert list(metadata.versions) == ["1"]
        assert metadata.platform
        (image,) = metadata.inputs
        assert (image.name, image.datatype, tuple(image.shape)) == ("image", "UINT8", (-1, *SHAPE))
        outputs = {one.name: (one.datatype, tuple(one.shape)) for one in metadata.outputs}
        expected = ("FP32", (-1, len(asked.labels)))
        assert outputs == {"probabilities": expected, "logits": expected}
        as_json = client.get_model_metadata(MODEL, "1", as_json=True)
        assert as_json["inputs"][0]["shape"] == ["-1", "2", "2", "1"]


def model_config_agrees_with_the_metadata(asked):
    with asked.client() as client:
        config = client.get_model_config(MODEL).config
        assert (config.name, config.backend) == (MODEL, "onnxruntime")
        assert config.max_batch_size == asked.max_batch_rows
        assert config.HasField("dynamic_batching")
        assert not config.model_transaction_policy.decoupled
        (image,) = config.input
        assert (image.name, tuple(image.dims)) == ("image", SHAPE)
        assert {one.name: tuple(one.dims) for one in config.output} == {
            "probabilities": (len(asked.labels),),
            "logits": (len(asked.labels),),
        }


def model_config_is_the_same_as_json(asked):
    with asked.client() as client:
        config = client.get_model_config(MODEL, "1", as_json=True)["config"]
        assert config["max_batch_size"] == asked.max_batch_rows
        assert config["input"][0]["data_type"] == "TYPE_UINT8"
        assert config["output"][0]["data_type"] == "TYPE_FP32"


def repository_index_lists_the_version_as_ready(asked):
    with asked.client() as client:
        (model,) = client.get_model_repository_index().models
        assert (model.name, model.version, model.state) == (MODEL, "1", "READY")
        (model,) = client.get_model_repository_index(as_json=True)["models"]
        assert model["state"] == "READY"


def raw_images_get_both_outputs(asked):
    with asked.client() as client:
        for rows in (1, 2, 7):
            asked.check(client.infer(MODEL, asked.inputs(0, rows)), 0, rows)
        result = client.infer(MODEL, asked.inputs())
        asked.check(result)
        response = result.get_response()
        assert (response.model_name, response.model_version) == (MODEL, "1")
        assert result.get_output("logits").datatype == "FP32"


def request_id_comes_back(asked):
    with asked.client() as client:
        result = client.infer(MODEL, asked.inputs(0, 1), request_id="question-7")
        assert result.get_response().id == "question-7"
        assert result.get_response(as_json=True)["id"] == "question-7"


def only_requested_outputs_are_sent_in_the_order_of_the_request(asked):
    with asked.client() as client:
        outputs = [InferRequestedOutput("logits")]
        result = client.infer(MODEL, asked.inputs(0, 3), outputs=outputs)
        assert [one.name for one in result.get_response().outputs] == ["logits"]
        np.testing.assert_allclose(result.as_numpy("logits"), asked.logits[:3], atol=1e-3)
        assert result.as_numpy("probabilities") is None

        outputs = [InferRequestedOutput("logits"), InferRequestedOutput("probabilities")]
        asked.check(client.infer(MODEL, asked.inputs(0, 3), outputs=outputs), 0, 3)


def classification_names_the_best_classes(asked):
    with asked.client() as client:
        outputs = [InferRequestedOutput("probabilities", class_count=2)]
        result = client.infer(MODEL, asked.inputs(0, 12), outputs=outputs)
        classes = result.as_numpy("probabilities")
        assert classes.shape == (12, 2)
        assert result.get_output("probabilities").datatype == "BYTES"
        best = np.argsort(-asked.probabilities[:12], axis=1, kind="stable")[:, :2]
        for row, indices, answer in zip(asked.probabilities[:12], best, classes, strict=True):
            for index, text in zip(indices, answer, strict=True):
                value, place, label = text.decode().split(":")
                np.testing.assert_allclose(row[int(place)], row[index], atol=1e-6)
                np.testing.assert_allclose(float(value), row[index], atol=1e-5)
                assert label == asked.labels[int(place)]


def version_may_be_named(asked):
    with asked.client() as client:
        asked.check(client.infer(MODEL, asked.inputs(0, 2), model_version="1"), 0, 2)


def priority_timeout_and_sequence_change_no_answer(asked):
    with asked.client() as client:
        for options in (
            {"priority": 1},
            {"timeout": 10_000_000},
            {"priority": 2, "timeout": 10_000_000, "client_timeout": WAIT_S},
        ):
            asked.check(client.infer(MODEL, asked.inputs(0, 2), **options), 0, 2)


def parameters_of_any_kind_are_accepted(asked):
    with asked.client() as client:
        parameters = {"text": "x", "whole": 3, "real": 1.5, "switch": True}
        asked.check(client.infer(MODEL, asked.inputs(0, 2), parameters=parameters), 0, 2)


def compressed_requests_are_understood(asked):
    with asked.client() as client:
        for algorithm in asked.compressions:
            result = client.infer(MODEL, asked.inputs(), compression_algorithm=algorithm)
            asked.check(result)


def pictures_are_read_like_their_pixels(asked):
    with asked.client() as client:
        rows = len(asked.pictures)
        pictures = InferInput("image", [rows], "BYTES")
        pictures.set_data_from_numpy(np.array(asked.pictures, dtype=np.object_))
        asked.check(client.infer(MODEL, [pictures]), 0, rows)


def file_that_is_no_picture_is_refused(asked):
    with asked.client() as client:
        picture = InferInput("image", [1], "BYTES")
        picture.set_data_from_numpy(np.array([b"no picture"], dtype=np.object_))
        with refused("INVALID_ARGUMENT", "[request id: "):
            client.infer(MODEL, [picture])


def deadline_that_cannot_be_met_is_told(asked):
    with asked.client() as client:
        with refused("DEADLINE_EXCEEDED"):
            client.infer(MODEL, asked.inputs(0, 1), client_timeout=-1.0)  # core rounds up to 1 ms
        asked.check(client.infer(MODEL, asked.inputs(0, 1), client_timeout=WAIT_S), 0, 1)


def unknown_models_and_versions_are_not_found(asked):
    with asked.client() as client:
        for call in (
            lambda: client.infer("nobody", asked.inputs(0, 1)),
            lambda: client.get_model_metadata("nobody"),
            lambda: client.get_model_config("nobody"),
            lambda: client.get_inference_statistics("nobody"),
        ):
            with refused("NOT_FOUND", "Request for unknown model: 'nobody' is not found"):
                call()
        for call in (
            lambda: client.infer(MODEL, asked.inputs(0, 1), model_version="7"),
            lambda: client.get_model_metadata(MODEL, "7"),
            lambda: client.get_model_config(MODEL, "7"),
        ):
            with refused("NOT_FOUND", "tiny", "7"):
                call()


def wrong_shapes_datatypes_and_tensors_are_invalid(asked):
    def tensor(name, array, datatype):
        made = InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        return made

    image = asked.images[:1]
    wide = np.zeros((1, 3, 3, 1), np.uint8)
    short = tensor("image", asked.images[:2], "UINT8")
    short.set_shape([3, *SHAPE])
    many = np.zeros((asked.max_batch_rows + 1, *SHAPE), np.uint8)
    for inputs, phrases in (
        ([tensor("image", wide, "UINT8")], ("image", "3,3,1")),
        ([tensor("image", image.astype(np.float32), "FP32")], ("image", "FP32", "UINT8")),
        ([short], ("image", "12", "8")),
        ([tensor("picture", image, "UINT8")], ("picture",)),
        ([], ("image",)),
        ([tensor("image", image, "UINT8")] * 2, ("image",)),
        (
            [tensor("image", many, "UINT8")],
            (f"batch-size must be <= {asked.max_batch_rows}",),
        ),
    ):
        with (
            asked.client() as client,
            refused("INVALID_ARGUMENT", "[request id: bad]", *phrases),
        ):
            client.infer(MODEL, inputs, request_id="bad")


def unknown_and_repeated_outputs_are_invalid(asked):
    with asked.client() as client:
        with refused("INVALID_ARGUMENT", "[request id: <id_unknown>]", "nothing"):
            client.infer(MODEL, asked.inputs(0, 1), outputs=[InferRequestedOutput("nothing")])
        with refused("INVALID_ARGUMENT", "logits"):
            client.infer(MODEL, asked.inputs(0, 1), outputs=[InferRequestedOutput("logits")] * 2)


def features_that_are_not_here_are_unimplemented(asked):
    with asked.client() as client:
        for call in (
            client.get_trace_settings,
            client.get_log_settings,
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            lambda: client.register_system_shared_memory("region", "/region", 16),
            lambda: client.update_log_settings({"log_verbose_level": 1}),
        ):
            with refused("UNIMPLEMENTED"):
                call()
        shared = InferInput("image", [1, *SHAPE], "UINT8")
        shared.set_shared_memory("region", 4)
        with refused("UNIMPLEMENTED"):
            client.infer(MODEL, [shared])


def many_calls_at_once_get_their_own_answers(asked):
    answers: queue.Queue[Any] = queue.Queue()

    def ask(client, start):
        def answered(result, error):
            answers.put((start, result, error))

        return client.async_infer(
            MODEL, asked.inputs(start, start + 3), answered, request_id=str(start)
        )

    with asked.client() as client:
        calls = [ask(client, start) for start in range(len(asked.images) - 3)]
        for _ in calls:
            start, result, error = answers.get(timeout=WAIT_S)
            assert error is None, error
            assert result.get_response().id == str(start)
            asked.check(result, start, start + 3)


def refusal_reaches_the_callback(asked):
    answers: queue.Queue[Any] = queue.Queue()
    with asked.client() as client:
        client.async_infer(
            "nobody", asked.inputs(0, 1), lambda result, error: answers.put((result, error))
        )
        result, error = answers.get(timeout=WAIT_S)
        assert result is None
        check_refusal(error, "NOT_FOUND", "Request for unknown model")


def nobody_loads_models_where_there_is_no_admin(asked):
    with asked.client() as client:
        for call in (client.load_model, client.unload_model):
            with refused("PERMISSION_DENIED"):
                call(MODEL, headers=asked.admin)
        assert client.is_model_ready(MODEL)
