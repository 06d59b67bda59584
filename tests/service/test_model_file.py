import contextlib
import random

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from protos import onnx_pb2
from service import bundle, model_file
from service.errors import BundleError

SOURCE = "tiny/1/model.onnx"
OUTSIDE = (
    f"{SOURCE} keeps the tensor 'weights' outside the file; "
    "export the model with all its data in one file"
)
SPARSE = (
    f"{SOURCE} has the sparse tensor 'weights', which is not taken; "
    "export the model with dense tensors"
)
CUT = f"{SOURCE} is not an ONNX model: it was cut or changed, or is nested too deeply"


def refusal(content):
    with pytest.raises(BundleError) as caught:
        model_file.check(content, SOURCE)
    return str(caught.value)


def plain():
    return numpy_helper.from_array(np.ones(2, np.float32), "weights")


def external(location="weights.bin"):
    tensor = plain()
    external_data_helper.set_external_data(tensor, location)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    return tensor


def in_memory():
    """Point at memory as onnxruntime does: an address is given as an offset."""
    tensor = plain()
    external_data_helper.set_external_data(
        tensor, "*/_ORT_MEM_ADDR_/*", offset=0x7F0000000000, length=8
    )
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def without_entries():
    tensor = plain()
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def without_location():
    tensor = external()
    tensor.ClearField("data_location")
    return tensor


def of_a_location_to_come():
    """Set a location that no version of ONNX has yet; proto2 keeps it as an unknown field."""
    return TensorProto.FromString(plain().SerializeToString() + b"\x70\x02")


def sparse():
    return helper.make_sparse_tensor(
        plain(), numpy_helper.from_array(np.array([0, 2]), "indices"), [4]
    )


def graph(*nodes, **fields):
    made = helper.make_graph(list(nodes), "graph", [], [], **fields)
    made.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]))
    return made


def constant(**attribute):
    return helper.make_node("Constant", [], ["y"], **attribute)


def branch(inner):
    return helper.make_node("If", ["c"], ["y"], then_branch=graph(), else_branch=inner)


def loop(inner):
    return helper.make_node("Loop", ["n", "c"], ["y"], body=inner)


def scan(inner):
    return helper.make_node("Scan", ["x"], ["y"], body=inner, num_scan_inputs=1)


def with_graphs(inner):
    node = helper.make_node("Other", [], ["y"], domain="other")
    node.attribute.append(helper.make_attribute("bodies", [graph(), inner]))
    return node


def function(*nodes, attributes=()):
    made = helper.make_function(
        "other", "f", [], ["y"], list(nodes), [helper.make_opsetid("", 17)], []
    )
    made.attribute_proto.extend(attributes)
    return made


def model(made, **fields):
    return helper.make_model(made, **fields)


def trained(**fields):
    made = model(graph())
    made.training_info.add(**fields)
    return made


# Every place of a dense tensor.
PLACES = {
    "initialiser": lambda tensor: model(graph(initializer=[plain(), tensor])),
    "constant": lambda tensor: model(graph(constant(value=tensor))),
    "tensors of an attribute": lambda tensor: model(graph(constant(values=[plain(), tensor]))),
    "if": lambda tensor: model(graph(branch(graph(initializer=[tensor])))),
    "loop": lambda tensor: model(graph(loop(graph(initializer=[tensor])))),
    "scan": lambda tensor: model(graph(scan(graph(initializer=[tensor])))),
    "graphs of an attribute": lambda tensor: model(graph(with_graphs(graph(initializer=[tensor])))),
    "constant in a loop in an if": lambda tensor: model(
        graph(branch(graph(loop(graph(constant(value=tensor))))))
    ),
    "function": lambda tensor: model(graph(), functions=[function(constant(value=tensor))]),
    "if in a function": lambda tensor: model(
        graph(), functions=[function(branch(graph(initializer=[tensor])))]
    ),
    "default of a function": lambda tensor: model(
        graph(), functions=[function(attributes=[helper.make_attribute("a", tensor)])]
    ),
    "graph that is a function's default": lambda tensor: model(
        graph(),
        functions=[function(attributes=[helper.make_attribute("a", graph(initializer=[tensor]))])],
    ),
    "initialisation of the training": lambda tensor: trained(
        initialization=graph(initializer=[tensor])
    ),
    "step of the training": lambda tensor: trained(algorithm=graph(constant(value=tensor))),
}
KINDS = [external, in_memory, without_entries, without_location, of_a_location_to_come]
SPARSE_PLACES = {
    "initialiser": lambda: model(graph(sparse_initializer=[sparse()])),
    "constant": lambda: model(graph(constant(sparse_value=sparse()))),
    "tensors of an attribute": lambda: model(graph(constant(values=[sparse()]))),
    "loop": lambda: model(graph(loop(graph(sparse_initializer=[sparse()])))),
    "function": lambda: model(graph(), functions=[function(constant(sparse_value=sparse()))]),
    "step of the training": lambda: trained(algorithm=graph(sparse_initializer=[sparse()])),
}


@pytest.mark.parametrize("place", PLACES)
def test_tensor_in_the_file_is_taken_wherever_it_is(place):
    model_file.check(PLACES[place](plain()).SerializeToString(), SOURCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_tensor_outside_the_file_is_refused_wherever_it_is(place, kind):
    assert refusal(PLACES[place](kind()).SerializeToString()) == OUTSIDE


@pytest.mark.parametrize("place", SPARSE_PLACES)
def test_sparse_tensor_is_refused_wherever_it_is(place):
    assert refusal(SPARSE_PLACES[place]().SerializeToString()) == SPARSE


def test_sparse_tensor_without_anything_in_it_is_refused():
    assert "has the sparse tensor ''" in refusal(
        model(graph(sparse_initializer=[onnx.SparseTensorProto()])).SerializeToString()
    )
    empty = onnx.AttributeProto(name="a", sparse_tensor=onnx.SparseTensorProto())
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(empty)
    assert "has the sparse tensor ''" in refusal(model(graph(node)).SerializeToString())


def test_every_place_onnx_has_for_a_tensor_is_looked_at():
    """Walk both schemas: a version of ONNX that adds a place for tensors fails here."""
    checked = set()

    def walk(theirs, ours):
        for field in theirs.fields:
            if field.message_type is None or not leads_to_a_tensor(field.message_type):
                continue
            assert field.number in ours.fields_by_number, f"{theirs.name}.{field.name}"
            inner, mine = field.message_type, ours.fields_by_number[field.number].message_type
            if inner.name not in checked and inner.name not in TENSORS:
                checked.add(inner.name)
                walk(inner, mine)

    walk(onnx.ModelProto.DESCRIPTOR, onnx_pb2.Model.DESCRIPTOR)
    for field in onnx_pb2.Tensor.DESCRIPTOR.fields:
        assert TensorProto.DESCRIPTOR.fields_by_number[field.number].name == field.name
    assert checked == {
        "AttributeProto",
        "FunctionProto",
        "GraphProto",
        "NodeProto",
        "TrainingInfoProto",
    }


TENSORS = {"TensorProto", "SparseTensorProto"}


def leads_to_a_tensor(message, above=()):
    return message.name in TENSORS or (
        message.name not in above
        and any(
            leads_to_a_tensor(field.message_type, (*above, message.name))
            for field in message.fields
            if field.message_type is not None
        )
    )


def test_model_that_is_served_is_taken(tiny):
    model_file.check(tiny.model(), SOURCE)


def test_long_name_of_a_tensor_is_cut_and_a_strange_one_escaped():
    tensor = external()
    tensor.name = "w\n" + "x" * 1000

    assert refusal(model(graph(initializer=[tensor])).SerializeToString()).startswith(
        f"{SOURCE} keeps the tensor 'w\\n{'x' * 62}…' outside the file; "
    )


def test_where_the_data_would_be_is_not_repeated():
    assert "/etc" not in refusal(
        model(graph(initializer=[external("/etc/passwd")])).SerializeToString()
    )


@pytest.mark.parametrize("content", [b"", b"\x08\x08"], ids=["nothing", "no graph"])
def test_file_without_a_graph_is_refused(content):
    assert refusal(content) == f"{SOURCE} is not an ONNX model: it has no graph"


def test_cut_file_is_refused(tiny):
    content = tiny.model()

    assert refusal(content[: len(content) // 2]) == CUT


def nested(levels):
    """Nest `If` in `If`, written from the inside so that nothing here recurses either."""

    def field(number, content):
        size, prefix = len(content), bytearray([number << 3 | 2])
        while size > 127:
            prefix.append(size & 127 | 128)
            size >>= 7
        return bytes([*prefix, size]) + content

    content = model(graph(initializer=[external()])).graph.SerializeToString()
    for _ in range(levels):
        content = field(1, field(5, field(6, content)))  # node, attribute, g
    return field(7, content)


def test_tensor_in_the_deepest_graph_that_is_read_is_found():
    assert refusal(nested(30)) == OUTSIDE


@pytest.mark.parametrize("levels", [40, 1000, 20_000])
def test_file_nested_deeper_than_protobuf_reads_is_refused(levels):
    assert refusal(nested(levels)) == CUT


def test_groups_nested_deeper_than_protobuf_reads_are_refused(tiny):
    assert refusal(tiny.model() + b"\xf3\x03" * 1_000_000) == CUT  # group 62 opened, and so on


def test_graph_given_in_two_parts_is_read_as_one(tiny):
    """Protobuf joins the parts of a message that is not repeated, in onnxruntime as well."""
    part = model(graph(initializer=[external()]))
    part.ClearField("ir_version")

    assert refusal(tiny.model() + part.SerializeToString()) == OUTSIDE
    assert refusal(part.SerializeToString() + tiny.model()) == OUTSIDE


def test_format_of_onnxruntime_is_refused(tiny, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tiny.model(), options, providers=["CPUExecutionProvider"])

    assert refusal((tmp_path / "model.ort").read_bytes()) == (
        f"{SOURCE} is in onnxruntime's own format, expected ONNX; publish the ONNX model"
    )


def test_onnx_model_that_carries_the_mark_of_onnxruntimes_format_is_refused(tiny):
    content = b"\x12\x06\0\0ORTM" + tiny.model()  # the producer's name
    onnx.checker.check_model(content)

    assert "is in onnxruntime's own format" in refusal(content)


def test_bundle_whose_model_reaches_outside_is_refused(make_bundle):
    path = make_bundle(model=model(graph(initializer=[external()])).SerializeToString())

    with pytest.raises(BundleError) as caught:
        bundle.read(path)

    assert str(caught.value) == OUTSIDE


MUTATED = [
    made.SerializeToString()
    for made in (
        PLACES["constant in a loop in an if"](external()),
        PLACES["default of a function"](in_memory()),
        PLACES["step of the training"](plain()),
        SPARSE_PLACES["tensors of an attribute"](),
    )
]


@given(st.binary() | st.sampled_from(MUTATED).flatmap(lambda one: st.binary().map(one.__add__)))
def test_arbitrary_bytes_are_taken_or_refused(content):
    taken_or_refused(content)


@given(st.sampled_from(MUTATED), st.integers(0, 2**32))
def test_mutated_file_is_taken_or_refused(content, seed):
    rng = random.Random(seed)
    mutated = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    start, end = sorted(rng.randrange(len(mutated)) for _ in range(2))
    if rng.random() < 0.5:
        mutated[start:start] = mutated[start:end]

    taken_or_refused(bytes(mutated))


def taken_or_refused(content):
    """Hold `check` against a walk over everything that onnx itself reads."""
    try:
        model_file.check(content, SOURCE)
    except BundleError as error:
        assert str(error).startswith(SOURCE)
        assert "\n" not in str(error)
    else:
        with contextlib.suppress(DecodeError):  # of parts that the check has no need to read
            assert all(
                isinstance(part, TensorProto) and not part.external_data and not part.data_location
                for part in parts(onnx.ModelProto.FromString(content))
                if type(part).__name__ in TENSORS
            )


def parts(message):
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from parts(part)
