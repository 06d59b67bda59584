import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2
from service.errors import InvalidRequestError
from service.parameters import Parameters


@pytest.fixture
def read(options):
    """Return a function that reads parameters given by kind: read(priority=("uint64", 1))."""

    def read(changes=None, **parameters):
        request = inference_pb2.ModelInferRequest()
        for name, (kind, value) in parameters.items():
            setattr(request.parameters[name], f"{kind}_param", value)
        return Parameters.read(request, options(**(changes or {})))

    return read


LEVELS = {"priority_levels": 4, "default_priority": 2}


def refusal(read, changes=None, **parameters):
    with pytest.raises(InvalidRequestError) as caught:
        read(changes, **parameters)
    return str(caught.value)


def test_request_without_parameters_waits_as_its_model_says(read):
    assert read() == Parameters(level=1, wait_s=math.inf)
    assert read(LEVELS) == Parameters(level=2, wait_s=math.inf)
    assert read({"queue_timeout_s": 3.0}) == Parameters(level=1, wait_s=3)


@pytest.mark.parametrize("kind", ["int64", "uint64"])
@pytest.mark.parametrize(
    ("asked", "level"), [(0, 2), (1, 1), (3, 3), (4, 4), (5, 2), (2**63 - 1, 2)]
)
def test_priority_is_a_level_or_else_the_default(read, kind, asked, level):
    assert read(LEVELS, priority=(kind, asked)).level == level
    assert read(priority=(kind, asked)).level == 1  # of a model that has no levels


def test_largest_priority_of_64_bits_is_no_level(read):
    assert read(LEVELS, priority=("uint64", 2**64 - 1)).level == 2


def test_negative_priority_is_refused(read):
    assert refusal(read, LEVELS, priority=("int64", -1)) == (
        "the parameter 'priority' is -1, expected 0 or more"
    )


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_timeout_is_in_microseconds(read, kind):
    assert read(timeout=(kind, 1_500_000)).wait_s == 1.5
    assert read(timeout=(kind, 1)).wait_s == 1e-6
    assert read(timeout=(kind, 0)).wait_s == math.inf


def test_timeout_makes_the_models_own_shorter_and_never_longer(read):
    changes = {"queue_timeout_s": 2.0}

    assert read(changes, timeout=("int64", 1_999_999)).wait_s == 1.999999
    assert read(changes, timeout=("int64", 2_000_001)).wait_s == 2
    assert read(changes, timeout=("int64", 0)).wait_s == 2


def test_timeout_means_nothing_where_the_model_forbids_it(read):
    changes = {"queue_timeout_s": 2.0, "allow_timeout_override": False}

    assert read(changes, timeout=("int64", 1)).wait_s == 2


def test_negative_timeout_is_refused(read):
    assert refusal(read, timeout=("int64", -1)) == (
        "the parameter 'timeout' is -1, expected microseconds, 0 or more"
    )


@pytest.mark.parametrize("kind", ["int64", "uint64"])
def test_longest_timeout_there_is_does_no_harm(read, kind):
    longest = 2**63 - 1 if kind == "int64" else 2**64 - 1

    assert read(timeout=(kind, longest)).wait_s == pytest.approx(longest / 1e6)


@pytest.mark.parametrize("name", ["priority", "timeout"])
@pytest.mark.parametrize(("kind", "value"), [("string", "1"), ("bool", True), ("double", 1.0)])
def test_number_of_another_kind_is_refused(read, name, kind, value):
    assert refusal(read, **{name: (kind, value)}).startswith(
        f"the parameter '{name}' is given as {kind}_param, expected "
    )


@pytest.mark.parametrize("name", ["priority", "timeout"])
def test_parameter_without_a_value_is_refused(options, name):
    request = inference_pb2.ModelInferRequest()
    request.parameters[name].SetInParent()

    with pytest.raises(InvalidRequestError, match=f"the parameter '{name}' is given as None"):
        Parameters.read(request, options())


@pytest.mark.parametrize("name", ["triton_", "triton_nonsense", "triton_final_response"])
def test_names_that_triton_keeps_are_refused(read, name):
    assert refusal(read, **{name: ("bool", True)}) == (
        "parameter keys starting with 'triton_' are reserved for Triton; "
        f"this server knows no '{name}'"
    )


def test_wish_for_an_empty_last_response_is_known_and_must_be_a_bool(read):
    assert read(triton_enable_empty_final_response=("bool", True)) == read()
    assert "expected bool_param" in refusal(
        read, triton_enable_empty_final_response=("string", "yes")
    )


@pytest.mark.parametrize(
    "name", ["sequence_id", "sequence_start", "headers", "binary_data_output", "Triton_x", "größe"]
)
@pytest.mark.parametrize(
    ("kind", "value"),
    [("string", "x"), ("int64", -1), ("uint64", 1), ("bool", False), ("double", math.nan)],
)
def test_other_parameters_are_accepted_and_mean_nothing(read, name, kind, value):
    assert read(**{name: (kind, value)}) == read()


VALUES = st.one_of(
    st.builds(lambda value: inference_pb2.InferParameter(bool_param=value), st.booleans()),
    st.builds(
        lambda value: inference_pb2.InferParameter(int64_param=value),
        st.integers(-(2**63), 2**63 - 1),
    ),
    st.builds(
        lambda value: inference_pb2.InferParameter(uint64_param=value), st.integers(0, 2**64 - 1)
    ),
    st.builds(lambda value: inference_pb2.InferParameter(double_param=value), st.floats()),
    st.builds(lambda value: inference_pb2.InferParameter(string_param=value), st.text(max_size=9)),
    st.builds(inference_pb2.InferParameter),
)
NAMES = st.sampled_from(["priority", "timeout", "triton_enable_empty_final_response", "other"])


@given(st.dictionaries(NAMES | st.text(max_size=9), VALUES, max_size=4), st.integers(0, 3))
def test_any_parameters_are_read_or_refused(options, parameters, levels):
    request = inference_pb2.ModelInferRequest(parameters=parameters)

    try:
        found = Parameters.read(
            request, options(priority_levels=levels, default_priority=min(levels, 1))
        )
    except InvalidRequestError:
        return

    assert 1 <= found.level <= max(1, levels)
    assert found.wait_s > 0
