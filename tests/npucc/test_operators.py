"""Where operators and nodes run."""

from __future__ import annotations

import onnx
from onnx import TensorProto as T
from onnx import helper as h

from npucc import operators
from npucc.frontend import OPERATORS


def test_the_manual_is_up_to_date() -> None:
    assert operators.MANUAL.read_text(encoding="utf-8") == operators.manual(), "run python -m npucc.operators"


def test_every_operator_has_one_place() -> None:
    rows = operators.table()
    names = [row.name for row in rows]
    assert names == sorted(set(names))
    assert {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""} <= set(names)
    places = {row.name: row.place for row in rows}
    assert (places["Conv"], places["Relu"], places["Transpose"], places["Constant"], places["NonZero"]) == (
        operators.MATRIX, operators.VECTOR, operators.MOVES, operators.FOLDED, operators.HOST,
    )  # fmt: skip
    assert all(places[name] != operators.HOST for domain, name in OPERATORS if not domain)
    assert all(row.note for row in rows if row.place == operators.HOST)


def test_every_node_of_a_model_is_placed() -> None:
    nodes = [
        h.make_node("Constant", [], ["c"], "constant", value_float=2.0), h.make_node("Mul", ["x", "c"], ["m"], "mul"),
        h.make_node("MatMul", ["m", "w"], ["p"], "product"), h.make_node("Det", ["p"], ["y"], "det"),
    ]  # fmt: skip
    weights = h.make_tensor("w", T.FLOAT, [4, 4], [0.5] * 16)
    graph = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, [4, 4])], [h.make_tensor_value_info("y", T.FLOAT, [])], [weights]
    )
    rows = operators.place(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)]), {})
    assert {row.node: row.place for row in rows} == {
        "constant": operators.FOLDED, "mul": operators.VECTOR, "product": operators.MATRIX, "det": operators.HOST,
    }  # fmt: skip
    assert [row.reason for row in rows if row.place == operators.HOST] == ["operator Det is not supported"]
