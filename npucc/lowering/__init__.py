"""Lowering: an integer graph and a target in, a program and its constants out.

In the order data passes through: views (where tensors lie), placement (buffers and addresses), layers (what is fused),
convolution / product / elementwise / window / reduction / rows / movement (a layer's tiles and instructions; search finds the
tiles, cost prices them), synchronize (events), roll (loops).
"""

from npucc.lowering.lower import Lowered, layer_cycles, lower

__all__ = ["Lowered", "layer_cycles", "lower"]
