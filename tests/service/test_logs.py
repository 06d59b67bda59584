import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from service import logs
from service.json_lines import Json
from service.logs import Call, Console

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +[a-z.]+: ")
HOSTILE = (
    "a\n2026-01-01 00:00:00,000 INFO    service.server: stopped",
    "a\r\n{}",
    '"} {"level": "INFO',
    "\x1b[2J\x1b]0;title\x07",
    "\x00\x08\x7f\x85\x9b31m",
    "\u2028\u2029\u202e\u200b\ufeff",
    "\udc80",
    "x" * 100_000,
)
CALL = Call(
    method="/inference.GRPCInferenceService/ModelInfer",
    code="OK",
    seconds=0.0012345,
    peer="ipv4:127.0.0.1:40000",
    request_id="a-1",
    model="tiny",
    version="3",
    rows=4,
)


@pytest.fixture
def written() -> Iterator[dict[str, io.StringIO]]:
    """What is logged below `service` in either form."""
    streams = {"console": io.StringIO(), "json": io.StringIO()}
    handlers = [logging.StreamHandler(stream) for stream in streams.values()]
    logger = logging.getLogger("service")
    before = logger.level
    logger.setLevel(logging.INFO)
    for handler, formatter in zip(handlers, (Console(), Json()), strict=True):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    yield streams
    logger.setLevel(before)
    for handler in handlers:
        logger.removeHandler(handler)


def line(written) -> str:
    """Return the one line for people, less its time."""
    (text,) = written["console"].getvalue().removesuffix("\n").split("\n")
    assert LINE.match(text)
    return text.split(" ", 2)[2]


def record(written) -> dict[str, object]:
    """Return the one object for machines."""
    (text,) = written["json"].getvalue().removesuffix("\n").split("\n")
    return json.loads(text)


def test_event_is_a_line_or_an_object_with_its_fields(written):
    logging.getLogger("service.repository").warning(
        "version refused: %s", "|Δ| is too large", extra={"model": "tiny", "number": 3}
    )

    assert line(written) == "WARNING service.repository: version refused: |Δ| is too large"
    found = record(written)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", str(found.pop("time")))
    assert found == {
        "level": "WARNING",
        "logger": "service.repository",
        "message": "version refused: |Δ| is too large",
        "model": "tiny",
        "number": 3,
    }


def test_time_is_in_utc_and_comes_first():
    event = logging.LogRecord("service", logging.INFO, "", 0, "up", (), None)
    event.created = 1_700_000_000.25

    assert Json().format(event).startswith('{"time": "2023-11-14T22:13:20.250000Z", ')


def test_exception_is_indented_below_its_line_and_one_field_of_its_object(written):
    error = ValueError("first\n2026-01-01 00:00:00,000 INFO    service: forged\x1b[2J")
    logging.getLogger("service.rpc").error("call failed", exc_info=error)

    first, *others = written["console"].getvalue().removesuffix("\n").split("\n")
    assert first.endswith(" ERROR   service.rpc: call failed")
    assert others == [
        "    ValueError: first",
        "    2026-01-01 00:00:00,000 INFO    service: forged\\x1b[2J",
    ]
    assert record(written)["exception"] == f"ValueError: {error}"


def test_stack_is_indented_and_one_field(written):
    logging.getLogger("service").info("here", stack_info=True)

    assert written["console"].getvalue().split("\n")[1] == "    Stack (most recent call last):"
    assert str(record(written)["stack"]).startswith("Stack (most recent call last):\n")


def test_what_json_cannot_say_is_said_as_text(written):
    logging.getLogger("service").info("odd", extra={"odd": {1: object()}, "path": b"\xff"})

    assert "object object" in str(record(written)["odd"])


def test_call_is_one_readable_line_with_a_field_for_each_part(written):
    logs.access(CALL)

    assert line(written) == (
        "INFO    service.access: /inference.GRPCInferenceService/ModelInfer OK 1.234 ms "
        'model="tiny" version="3" rows=4 request_id="a-1" peer="ipv4:127.0.0.1:40000"'
    )
    found = record(written)
    assert {name: found[name] for name in Call.__dataclass_fields__} == {
        "method": "/inference.GRPCInferenceService/ModelInfer",
        "code": "OK",
        "seconds": 0.0012345,
        "peer": "ipv4:127.0.0.1:40000",
        "request_id": "a-1",
        "model": "tiny",
        "version": "3",
        "rows": 4,
    }
    assert found["logger"] == "service.access"


def test_parts_that_a_call_does_not_have_are_left_out_of_its_line(written):
    logs.access(Call(method="/grpc.health.v1.Health/Check", code="OK", seconds=0))

    assert line(written) == "INFO    service.access: /grpc.health.v1.Health/Check OK 0.000 ms"


@pytest.mark.parametrize("field", ["method", "request_id", "model", "version", "peer"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_a_call_forges_nothing_in_either_form(written, field, text):
    logs.access(Call(**{"method": "/m", "code": "OK", "seconds": 0.0, field: text}))

    assert line(written).isprintable()
    assert written["json"].getvalue().isascii()
    found = record(written)
    assert str(found[field]).isprintable()  # for those who print what they have read
    assert found["level"] == "INFO"
    assert len(str(found[field])) < 10 * logs.MAX_FIELD_CHARACTERS


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_any_other_event_forges_nothing(written, text):
    logging.getLogger("service.rpc").info("refused %s", text, extra={"request_id": text})

    assert line(written).isprintable()
    assert record(written)["message"] == f"refused {text}"
    assert written["json"].getvalue().isascii()


def test_quote_in_a_field_does_not_end_it(written):
    logs.access(Call(method="/m", code="OK", seconds=0, request_id='a" code="INTERNAL'))

    assert line(written).endswith(r'request_id="a\" code=\"INTERNAL"')


@pytest.mark.parametrize(("length", "cut"), [(128, "x" * 128), (129, "x" * 127 + "…")])
def test_long_field_is_cut(written, length, cut):
    logs.access(Call(method="/m", code="OK", seconds=0, request_id="x" * length))

    assert record(written)["request_id"] == cut


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Δ…", "plain, Δ…"),
        ("a\nb\t", r"a\nb\t"),
        ("\x1b\x85", r"\x1b\x85"),
        ("\u202e", r"\u202e"),
    ],
)
def test_only_what_is_not_printable_is_escaped(text, shown):
    assert logs.printable(text) == shown


LOG = """
import logging, sys
from service import logs
logging.basicConfig(stream=sys.stdout)  # what a library may have done before
logs.configure(sys.argv[1])
logging.getLogger("service.server").info("up \\u0394", extra={"port": 1})
logging.getLogger("service.server").debug("not this")
logging.getLogger("watchfiles.main").info("nor this")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_log_goes_to_standard_error_from_info_on(form):
    done = subprocess.run(
        [sys.executable, "-c", LOG, form], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout == ""
    (text,) = done.stderr.splitlines()
    if form == "json":
        assert json.loads(text)["port"] == 1
    else:
        assert LINE.match(text)
        assert text.endswith(" INFO    service.server: up Δ")


LEFT = """
import logging
from service import logs
logs.configure("console")
core = logging.getLogger("grpc._cython.cygrpc")
core.error("ExecuteBatchError raised in core by servicer method [/a/B]")
core.error("Unexpected [%s] raised by servicer method", "KeyError")
"""


def test_caller_who_leaves_while_the_answer_is_sent_is_no_error_of_ours():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)

    assert "ExecuteBatchError" not in done.stderr
    assert "Unexpected [KeyError] raised by servicer method" in done.stderr
