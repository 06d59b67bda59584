"""tritonclient.grpc.aio, the asynchronous client, against a server with the tiny model."""

import asyncio

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient

from tests.conformance.clients.asked import MODEL, SHAPE, image_input, refused_later

AT_ONCE = 64


async def server_says_what_it_is(asked):
    async with InferenceServerClient(asked.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL)
        assert not await client.is_model_ready("nobody")
        assert (await client.get_server_metadata()).name == "triton"
        metadata = await client.get_model_metadata(MODEL, as_json=True)
        assert metadata["inputs"][0]["name"] == "image"
        config = (await client.get_model_config(MODEL)).config
        assert config.max_batch_size == asked.max_batch_rows
        (model,) = (await client.get_model_repository_index()).models
        assert model.state == "READY"


async def images_pictures_and_classes_are_answered(asked):
    async with InferenceServerClient(asked.address) as client:
        result = await client.infer(MODEL, asked.inputs(0, 9), request_id="question")
        asked.check(result, 0, 9)
        assert result.get_response().id == "question"

        rows = len(asked.pictures)
        pictures = InferInput("image", [rows], "BYTES")
        pictures.set_data_from_numpy(np.array(asked.pictures, dtype=np.object_))
        asked.check(await client.infer(MODEL, [pictures], priority=1, timeout=10**7), 0, rows)

        outputs = [InferRequestedOutput("logits", class_count=1)]
        result = await client.infer(MODEL, asked.inputs(0, 1), outputs=outputs)
        best = int(asked.logits[0].argmax())
        assert result.as_numpy("logits")[0, 0].endswith(f":{best}:{asked.labels[best]}".encode())


async def many_requests_at_once_get_their_own_answers(asked):
    async with InferenceServerClient(asked.address) as client:

        async def ask(number):
            start, stop = number % 20, number % 20 + 1 + number % 7
            result = await client.infer(MODEL, asked.inputs(start, stop), request_id=str(number))
            assert result.get_response().id == str(number)
            asked.check(result, start, stop)

        await asyncio.gather(*map(ask, range(AT_ONCE)))
        statistics = await client.get_inference_statistics(MODEL)
        assert statistics.model_stats[0].inference_stats.success.count >= AT_ONCE


async def cancelled_request_harms_nobody(asked):
    async with InferenceServerClient(asked.address) as client:
        tasks = [asyncio.create_task(client.infer(MODEL, asked.inputs())) for _ in range(AT_ONCE)]
        await tasks[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        asked.check(await client.infer(MODEL, asked.inputs()))


async def refusals_have_triton_s_codes_and_phrases(asked):
    wide = image_input(np.zeros((1, 3, 3, 1), np.uint8))
    unknown = "Request for unknown model: 'nobody' is not found"
    async with InferenceServerClient(asked.address) as client:
        one = asked.inputs(0, 1)
        await refused_later(client.infer("nobody", one), "NOT_FOUND", unknown)
        await refused_later(client.get_model_config("nobody"), "NOT_FOUND", unknown)
        await refused_later(client.infer(MODEL, one, model_version="7"), "NOT_FOUND", "7")
        await refused_later(client.infer(MODEL, [wide]), "INVALID_ARGUMENT", "image", "3,3,1")
        await refused_later(client.infer(MODEL, one, client_timeout=-1.0), "DEADLINE_EXCEEDED")
        await refused_later(client.get_log_settings(), "UNIMPLEMENTED")
        await refused_later(client.unload_model(MODEL, headers=asked.admin), "PERMISSION_DENIED")


async def stream_is_answered_in_order_and_outlives_a_refusal(asked):
    async def requests():
        for number in range(20):
            bad = number == 7
            shape = (1, 3, 3, 1) if bad else (number + 1, *SHAPE)
            images = np.zeros(shape, np.uint8) if bad else asked.images[: number + 1]
            yield {
                "model_name": MODEL,
                "inputs": [image_input(images)],
                "request_id": f"number {number}",
            }

    async with InferenceServerClient(asked.address) as client:
        answers = [answer async for answer in client.stream_infer(requests())]

    assert len(answers) == 20
    for number, (result, error) in enumerate(answers):
        if number == 7:
            assert result is None
            assert "[request id: number 7]" in error.message()
            continue
        assert error is None, error
        assert result.get_response().id == f"number {number}"
        asked.check(result, 0, number + 1)
