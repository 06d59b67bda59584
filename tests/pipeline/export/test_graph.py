import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.export.graph import Graph, attribute, is_a

TWO = np.full((2, 2), 2, np.float32)


def written(nodes, *, takes="float[batch,2] x", gives="float[batch,2] y", **constants):
    """A model in onnx's text format."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> written ({takes}) => ({gives}) {{ {nodes} }}'
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    return model


@pytest.fixture
def model():
    return written("a = MatMul(x, k) b = MatMul(a, k) c = Neg(a) y = Add(b, c)", k=TWO)


def node(graph, tensor):
    return graph.maker(tensor)


def operators(model):
    return " ".join(each.op_type for each in model.graph.node)


def names(model):
    return [constant.name for constant in model.graph.initializer]


def test_without_a_change_the_model_is_the_one_that_was_given(model):
    assert Graph(model).model() is model


def test_a_change_is_not_in_the_model_that_was_given(model):
    before = model.SerializeToString()
    graph = Graph(model)

    graph.bypass(node(graph, "c"), 0)

    assert operators(graph.model()) == "MatMul MatMul Add"
    assert model.SerializeToString() == before


def test_nodes_know_their_neighbours(model):
    graph = Graph(model)

    assert graph.maker("a").op_type == "MatMul"
    assert graph.maker("x") is None
    assert graph.maker("k") is None
    assert [reader.output[0] for reader in graph.readers("a")] == ["b", "c"]
    assert [found.output[0] for found in graph.find("Neg", "Add")] == ["c", "y"]


def test_a_tensor_is_private_if_the_graph_alone_reads_it():
    inner = "z = Neg(a)"
    choice = (
        "a = Neg(x) b = Neg(x) c = Neg(x) y = If<"
        f"then_branch = yes () => (float[n,2] z) {{ {inner} }}, "
        "else_branch = no () => (float[n,2] w) { w = If<"
        "then_branch = yes () => (float[n,2] u) { u = Neg(b) }, "
        "else_branch = no () => (float[n,2] v) { v = Neg(b) }>(flag) }>(flag)"
    )
    graph = Graph(written(choice, takes="float[batch,2] x, bool flag"))

    assert [graph.is_private(tensor) for tensor in "abcy"] == [False, False, True, False]


def test_what_a_subgraph_reads_is_kept():
    choice = (
        "a = Neg(x) b = Neg(x) y = If<"
        "then_branch = yes () => (float[n,2] z) { z = MatMul(x, k) }, "
        "else_branch = no () => (float[n,2] a) { }>(flag) c = Neg(b)"
    )
    graph = Graph(written(choice, takes="float[batch,2] x, bool flag", k=TWO, unread=TWO))

    graph.bypass(node(graph, "c"), 0)

    assert operators(graph.model()) == "Neg If"
    assert names(graph.model()) == ["k"]


def test_constants_are_those_that_no_call_may_give():
    graph = Graph(
        written("a = MatMul(x, k) y = MatMul(a, w)", takes="float[batch,2] x, float[2,2] w", k=TWO)
    )

    np.testing.assert_array_equal(graph.constant("k"), TWO)
    assert graph.constant("w") is None
    assert graph.constant("a") is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64])
def test_weights_are_of_float32(dtype):
    graph = Graph(written("y = Neg(x)", k=TWO, other=TWO.astype(dtype)))

    np.testing.assert_array_equal(graph.weights("k"), TWO)
    assert graph.weights("other") is None
    assert graph.weights("x") is None


def test_shapes_leave_the_batch_open(model):
    graph = Graph(model)

    assert [graph.shape(tensor) for tensor in "xaby"] == [(None, 2)] * 4
    assert graph.shape("nothing") is None


def test_a_node_is_given_a_constant_of_its_own(model):
    graph = Graph(model)

    graph.give(node(graph, "a"), 1, TWO.T + 1)

    first, second, *_ = graph.model().graph.node
    assert (first.input[1], second.input[1]) == ("k_1", "k")
    assert names(graph.model()) == ["k", "k_1"]
    np.testing.assert_array_equal(graph.weights("k_1"), TWO + 1)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ("a = MatMul(x, k) k_1 = Neg(a) y = Neg(k_1)", {"k": TWO}),
        ("a = MatMul(x, k) y = MatMul(a, k_1)", {"k": TWO, "k_1": TWO}),
    ],
    ids=["a tensor", "a constant"],
)
def test_a_name_is_not_given_twice(nodes, constants):
    graph = Graph(written(nodes, **constants))

    graph.give(node(graph, "a"), 1, TWO)

    assert graph.maker("a").input[1] == "k_2"


def test_the_last_reader_takes_a_constant_along(model):
    graph = Graph(model)

    for name in ("a", "b"):
        graph.give(node(graph, name), 1, TWO)

    assert names(graph.model()) == ["k_1", "k_2"]


def test_a_node_becomes_another_under_the_same_names(model):
    graph = Graph(model)

    graph.become(node(graph, "b"), "Flatten", ["x"], axis=1)

    flatten = graph.model().graph.node[1]
    assert flatten.op_type == "Flatten"
    assert (list(flatten.input), list(flatten.output)) == (["x"], ["b"])
    assert attribute(flatten, "axis") == 1


def test_bypassed_node_is_gone_wherever_it_was_read():
    graph = Graph(written("a = Neg(x) y = Mul(a, a)"))

    graph.bypass(node(graph, "a"), 0)

    assert [list(left.input) for left in graph.model().graph.node] == [["x", "x"]]


def test_what_nothing_reads_any_more_is_gone_to_the_last():
    graph = Graph(written("a = Neg(x) b = Abs(a) c = Relu(b) y = Add(x, c)"))

    graph.become(node(graph, "y"), "Neg", ["x"])

    assert operators(graph.model()) == "Neg"


def test_an_operator_behind_a_node_has_its_name_for_all_that_read_it():
    graph = Graph(
        written("a = Neg(x) b = Abs(a) y = Add(a, b)", gives="float[n,2] y, float[n,2] a")
    )

    graph.follow(node(graph, "a"), "Add", TWO[0])

    followed = graph.model()
    onnx.checker.check_model(followed, full_check=True)
    assert operators(followed) == "Neg Add Abs Add"
    first, behind, *_ = followed.graph.node
    assert first.output == [behind.input[0]]
    assert behind.output == ["a"]
    np.testing.assert_array_equal(graph.weights(behind.input[1]), TWO[0])
    assert graph.shape("a") is None


def test_swapped_nodes_run_in_the_order_in_which_they_read():
    model = written(
        "a = Sub(k, x) n = Neg(x) y = Reshape(a, shape)",
        gives="float[n] y, float[batch,2] n",
        k=TWO[:1, 0],
        shape=np.array([-1]),
    )
    graph = Graph(model)

    graph.swap(node(graph, "a"), 1, node(graph, "y"))

    swapped = graph.model()
    onnx.checker.check_model(swapped, full_check=True)
    assert operators(swapped) == "Neg Reshape Sub"
    inputs = [list(each.input) for each in swapped.graph.node]
    assert inputs == [["x"], ["x", "shape"], ["k", "a"]]
    assert [each.output[0] for each in swapped.graph.node] == ["n", "a", "y"]


def test_shape_of_what_was_swapped_is_unknown():
    graph = Graph(written("a = Neg(x) y = Flatten(a)"))

    graph.swap(node(graph, "a"), 0, node(graph, "y"))

    assert graph.shape("a") is None
    assert graph.shape("y") == (None, 2)


def test_shapes_inside_are_dropped_with_a_change():
    model = onnx.shape_inference.infer_shapes(written("a = Neg(x) b = Neg(a) y = Neg(b)"))
    graph = Graph(model)

    graph.bypass(node(graph, "a"), 0)

    assert model.graph.value_info
    assert not graph.model().graph.value_info


@pytest.mark.parametrize(
    ("domain", "standard"), [("", True), ("ai.onnx", True), ("com.microsoft", False)]
)
def test_operators_are_the_standard_ones(domain, standard):
    gemm = onnx.helper.make_node("Gemm", ["x"], ["y"], domain=domain)

    assert is_a(gemm, "MatMul", "Gemm") == standard
    assert not is_a(gemm, "MatMul")
    assert not is_a(None, "Gemm")


def test_attributes_have_defaults():
    transpose = onnx.helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])

    assert attribute(transpose, "perm") == [1, 0]
    assert attribute(transpose, "other") is None
    assert attribute(transpose, "other", 7) == 7
