"""A Graph as an ONNX model: plain float before quantization, QDQ (quantize/dequantize pairs) after.

The one big idea: one emitter per graph operator writes its float meaning; an integer graph is the same float model with every
stored tensor between a QuantizeLinear and a DequantizeLinear. onnxruntime fuses those into integer kernels; what it has none for is
spelled out in integer operators, so that the model is an exact oracle for the NPU (session option `session.x64quantprecision=1`).
"""

from npucc.export.quantized import stored_name
from npucc.export.to_onnx import to_onnx

__all__ = ["stored_name", "to_onnx"]
