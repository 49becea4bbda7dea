"""From a float graph and sample inputs to an integer graph.

    calibrate ──▶ share ──▶ ranges ──▶ constants
    histograms    groups    scales     integers

The one big idea: a scale belongs to a group of tensors, those between which data only moves; each group's scale comes from the values
that its tensors took in the float model, run by onnxruntime on the samples.
"""

from npucc.quantize.options import QuantizeOptions
from npucc.quantize.quantize import Quantized, QuantizeReport, TensorRange, quantize

__all__ = ["QuantizeOptions", "QuantizeReport", "Quantized", "TensorRange", "quantize"]
