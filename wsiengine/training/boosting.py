"""A gradient-boosting head as ONNX: scikit-learn's trees, written as one TreeEnsembleClassifier node."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from sklearn.ensemble import GradientBoostingClassifier

_OPSET, _ML_OPSET, _IR = 17, 3, 8
ROWS, LABEL, SCORES = "rows", "label", "scores"


def export_boosting(model: GradientBoostingClassifier, path: Path) -> None:
    """Write a fitted two-class model.

    Input ``rows`` float32 (N, F); outputs ``scores`` float32 (N, 2), the probabilities of the classes in their order,
    and ``label`` int64 (N,).

    Both compare in float32 and so take the same branches; the sums differ in the last bits.

    Raises:
        ValueError: The model has more than two classes.
    """
    if len(model.classes_) != 2:
        raise ValueError(f"the boosting has {len(model.classes_)} classes: needed two")
    entries: dict[str, list[Any]] = {name: [] for name in _NODE_ENTRIES + _LEAF_ENTRIES}
    for number, (tree,) in enumerate(model.estimators_):
        _add_tree(entries, tree.tree_, number, float(model.learning_rate))
    prior = float(model.init_.class_prior_[1])
    attributes: dict[str, Any] = {
        "classlabels_int64s": [0, 1],
        "base_values": [float(np.log(prior / (1 - prior)))],
        "post_transform": "LOGISTIC",
        **entries,
    }
    node = helper.make_node("TreeEnsembleClassifier", [ROWS], [LABEL, SCORES], domain="ai.onnx.ml", **attributes)
    graph = helper.make_graph(
        [node],
        "boosting",
        [helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, ["N", model.n_features_in_])],
        [
            helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info(LABEL, TensorProto.INT64, ["N"]),
        ],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("ai.onnx.ml", _ML_OPSET)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="wsiengine")
    onnx.checker.check_model(made)
    onnx.save(made, path)


_NODE_ENTRIES = [
    f"nodes_{name}" for name in ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids")
]
_LEAF_ENTRIES = [f"class_{name}" for name in ("treeids", "nodeids", "ids", "weights")]


def _add_tree(entries: dict[str, list[Any]], tree: Any, number: int, rate: float) -> None:
    for node in range(tree.node_count):
        leaf = tree.children_left[node] < 0
        row = (
            number,
            node,
            0 if leaf else int(tree.feature[node]),
            "LEAF" if leaf else "BRANCH_LEQ",
            0.0 if leaf else float(_below(tree.threshold[node])),
            0 if leaf else int(tree.children_left[node]),
            0 if leaf else int(tree.children_right[node]),
        )
        for name, value in zip(_NODE_ENTRIES, row, strict=True):
            entries[name].append(value)
        if leaf:
            for name, value in zip(_LEAF_ENTRIES, (number, node, 0, rate * float(tree.value[node, 0, 0])), strict=True):
                entries[name].append(value)


def _below(threshold: float) -> np.float32:
    """The greatest float32 that is not above a float64 threshold: x ≤ threshold is then the same for a float32 x."""
    rounded = np.float32(threshold)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > threshold else rounded
