"""From an ONNX model to a Graph.

The one big idea: the model is walked once, in order, and every tensor is then either a known constant or has a known shape. So no shape
inference is needed: constants are folded as they are met, and each ONNX operator is imported by one function from one table, in the canonical
operators of `npucc.ops`, which say themselves what shape comes out.
"""

from npucc.frontend.importer import import_model
from npucc.frontend.operators import OPERATORS, supported_operators
from npucc.frontend.whole import import_whole

__all__ = ["OPERATORS", "import_model", "import_whole", "supported_operators"]
