"""The network and data that come with npucc: ten kinds of drawn shapes, 32×32 pixels (made by examples/train_demo.py)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "shapes.onnx"
SAMPLES = FOLDER / "shapes.npz"  # `image` and `labels`
CALIBRATION = FOLDER / "shapes_calibration.npz"  # `image`; no sample in common with SAMPLES
