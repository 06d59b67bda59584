"""Whether ModelStatistics agrees with what tritonclient sent to a server that was fresh."""

import time

import numpy as np

from tests.conformance.clients.asked import MODEL, image_input, refused

ROWS = (1, 2, 3, 4, 5)


def statistics_count_what_was_sent(asked):
    before_ms = time.time() * 1000 - 1
    with asked.client() as client:
        for rows in ROWS:
            client.infer(MODEL, asked.inputs(0, rows))
        with refused("INVALID_ARGUMENT"):
            client.infer(MODEL, [image_input(np.zeros((1, 3, 3, 1), np.uint8))])
        (model,) = client.get_inference_statistics(MODEL, "1").model_stats

    assert (model.name, model.version) == (MODEL, "1")
    assert model.inference_count == sum(ROWS)
    assert model.execution_count == len(ROWS)  # one after the other, so that none joined another
    assert before_ms <= model.last_inference <= time.time() * 1000 + 1
    told = model.inference_stats
    parts = (told.queue, told.compute_input, told.compute_infer, told.compute_output)
    assert told.success.count == len(ROWS)
    assert [part.count for part in parts] == [len(ROWS)] * len(parts)
    assert 0 < told.compute_infer.ns < told.success.ns
    assert sum(part.ns for part in parts) <= told.success.ns
    batches = {batch.batch_size: batch.compute_infer.count for batch in model.batch_stats}
    assert batches == dict.fromkeys(ROWS, 1)


def statistics_of_all_models_are_one_call(asked):
    with asked.client() as client:
        (model,) = client.get_inference_statistics().model_stats
        assert model.inference_count == sum(ROWS)
        (model,) = client.get_inference_statistics(as_json=True)["model_stats"]
        assert model["inference_stats"]["success"]["count"] == str(len(ROWS))
