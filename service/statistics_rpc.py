"""What ModelStatistics answers: every worker's figures, added up."""

from protos import inference_pb2
from service.errors import ModelNotFoundError
from service.statistics import FAILURES, Execution, Figure, Snapshot, Store


def statistics(
    store: Store, request: inference_pb2.ModelStatisticsRequest
) -> inference_pb2.ModelStatisticsResponse:
    """Answer ModelStatistics; versions that are not ready have none.

    Raises:
        ModelNotFoundError: a named model or version has no statistics.
    """
    found = [
        snapshot
        for snapshot in store.snapshots()
        if snapshot[Figure.READY]
        and request.name in {"", snapshot.name}
        and request.version in {"", str(snapshot.version)}
    ]
    if request.name and not found:
        version = f" version {request.version}" if request.version else ""
        raise ModelNotFoundError(
            f"Request for unknown model: '{request.name}'{version} is not found"
        )
    return inference_pb2.ModelStatisticsResponse(model_stats=[_message(one) for one in found])


def _message(one: Snapshot) -> inference_pb2.ModelStatistics:
    requests = one[Figure.SUCCESS]
    failures = sum(one[figure] for figure in FAILURES.values())
    message = inference_pb2.ModelStatistics(
        name=one.name,
        version=str(one.version),
        last_inference=int(one[Figure.LAST_MS]),
        inference_count=int(one[Figure.ROWS]),
        execution_count=int(one[Figure.EXECUTIONS]),
        inference_stats=inference_pb2.InferStatistics(
            success=_duration(requests, one[Figure.SUCCESS_S]),
            fail=_duration(failures, one[Figure.FAIL_S]),
            queue=_duration(requests, one[Figure.QUEUE_S]),
            compute_input=_duration(requests, one[Figure.INPUT_S]),
            compute_infer=_duration(requests, one[Figure.INFER_S]),
            compute_output=_duration(requests, one[Figure.OUTPUT_S]),
        ),
    )
    for rows, executions, seconds in one.by_size():
        message.batch_stats.append(_batch(rows, executions, seconds))
    return message


def _batch(rows: int, executions: int, seconds: Execution) -> inference_pb2.InferBatchStatistics:
    return inference_pb2.InferBatchStatistics(
        batch_size=rows,
        compute_input=_duration(executions, seconds.input_s),
        compute_infer=_duration(executions, seconds.infer_s),
        compute_output=_duration(executions, seconds.output_s),
    )


def _duration(count: float, seconds: float) -> inference_pb2.StatisticDuration:
    return inference_pb2.StatisticDuration(count=int(count), ns=round(seconds * 1e9))
