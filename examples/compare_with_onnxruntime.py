"""Take the quantized network out as ONNX and let onnxruntime check the NPU's arithmetic.

    python examples/compare_with_onnxruntime.py

The exported model has a QuantizeLinear / DequantizeLinear pair at every tensor. onnxruntime knows nothing of npucc, so that
agreement means something.
"""

from __future__ import annotations

import numpy as np
import onnxruntime

import npucc
from npucc import demo

package = npucc.compile(demo.MODEL, calibration=demo.CALIBRATION)
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact 8-bit products on every x86 processor
session = onnxruntime.InferenceSession(package.to_onnx().SerializeToString(), options)

with np.load(demo.SAMPLES) as samples:
    images = samples["image"][:50].astype(np.float32)

scale = package.program.outputs[0].scale
steps = []
for image in images:
    (wanted,) = session.run(["logits"], {"image": image[None]})
    found = package.run({"image": image[None]}).outputs["logits"]
    steps.append(np.rint((found - wanted) / scale))

different = np.count_nonzero(steps)
print(f"{different} of {np.size(steps)} outputs differ, by at most {np.abs(steps).max():.0f} step of the stored integers")
