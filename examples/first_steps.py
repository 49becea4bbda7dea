"""Compile a network, run it on the virtual NPU, and compare its answers with the labels.

    python examples/first_steps.py

The network and its data come with npucc. To use your own, change the three paths: samples are arrays with the model's
input names and a leading sample axis.
"""

from __future__ import annotations

import numpy as np

import npucc
from npucc import demo

package = npucc.compile(demo.MODEL, target="edge", calibration=demo.CALIBRATION)

with np.load(demo.SAMPLES) as samples:
    images, labels = samples["image"][:100], samples["labels"][:100]

results = [package.run({"image": image[None]}) for image in images]
answers = [int(result.outputs["logits"].argmax()) for result in results]
print(f"{np.mean(answers == labels):.0%} of {len(labels)} images are right")

result = results[0]
print(f"{result.cycles} cycles, {result.utilization:.1%} of the peak, {result.energy_pj / 1e6:.1f} microjoules each")
for layer in sorted(result.layers, key=lambda layer: -layer.cycles)[:3]:
    print(f"{layer.name}: {layer.cycles} cycles for ONNX nodes {', '.join(layer.nodes)}")

package.save("shapes.npu")
again = npucc.load("shapes.npu").run({"image": images[0][None]})
assert np.array_equal(again.raw["logits"], result.raw["logits"])
