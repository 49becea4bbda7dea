"""npucc as an ONNX backend: `onnx.backend.base.Backend`, in float mode.

    rep = npucc.backend.prepare(model)
    outputs = rep.run([x])

The one big idea: a model is compiled when its inputs are seen, so that open sizes, and sizes that depend on data, are those of the inputs.
The program is kept, and made anew only for inputs of other shapes. In float mode a model whose inputs or outputs the machine's memory can't hold
(strings, sequences, optional values, tensors without elements) has no program: onnxruntime runs it directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.backend.base import Backend, BackendRep, Device, DeviceType, namedtupledict

from npucc import compiler, segments
from npucc.compiler import FLOAT_MODE
from npucc.errors import NotHeldError
from npucc.package import Package

Array = np.ndarray[Any, np.dtype[Any]]


class NpuBackendRep(BackendRep):
    """A model, and the package it was compiled to for the inputs seen last."""

    def __init__(self, model: ModelProto, *, target: str = "edge", quant: str = FLOAT_MODE) -> None:
        stored = {tensor.name for tensor in model.graph.initializer}
        self.model, self.target, self.quant = model, target, quant
        self.names = [value.name for value in model.graph.input if value.name not in stored]
        self.package: Package | None = None
        self.on_host = False
        self._key: Any = None

    def _without_empty(self, feed: dict[str, Array]) -> tuple[ModelProto, dict[str, Array]]:
        """Inputs without elements have one possible value: they become constants of the model."""
        empty = {name: value for name, value in feed.items() if not value.size}
        if not empty:
            return self.model, feed
        model = ModelProto()
        model.CopyFrom(self.model)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in empty.items())
        return model, {name: value for name, value in feed.items() if name not in empty}

    def run(self, inputs: Any, **_: Any) -> tuple[Any, ...]:
        """The outputs, in order and by name. `inputs`: arrays in order, {name: array}, or one array. Raises NpuccError, RuntimeFault."""
        feed = self._feed(inputs)
        names = [value.name for value in self.model.graph.output]
        if not self.on_host and all(isinstance(value, np.ndarray) for value in feed.values()):
            try:
                return namedtupledict("Outputs", names)(*self._on_machine(feed))
            except NotHeldError:
                if self.quant != FLOAT_MODE:
                    raise
        self.on_host = True
        return namedtupledict("Outputs", names)(*segments.session(self.model.SerializeToString()).run(None, feed))

    def _on_machine(self, feed: dict[str, Array]) -> list[Array]:
        key = tuple((name, value.shape, value.dtype.str) for name, value in feed.items())
        model, feed = self._without_empty(feed)
        if self.package is None or key != self._key:
            shapes = {name: value.shape for name, value in feed.items() if value.shape}
            self.package = compiler.compile(model, self.target, calibration=[feed], shapes=shapes, quant=self.quant)
            self._key = key
        return list(self.package.machine.run(feed).outputs.values())

    def _feed(self, inputs: Any) -> dict[str, Any]:
        """Sequences stay lists, and an optional value that is missing None."""
        values = inputs if isinstance(inputs, Mapping) else dict(zip(self.names, inputs if isinstance(inputs, Sequence) else [inputs], strict=False))
        return {name: value if value is None or isinstance(value, list) else np.asarray(value) for name, value in values.items()}


class NpuBackend(Backend):
    """Every model that onnxruntime runs."""

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **options: Any) -> NpuBackendRep:
        """A model ready to run. `options`: target, quant as for `npucc.compile` (default: float mode)."""
        super().prepare(model, device, **options)
        return NpuBackendRep(model, **options)

    @classmethod
    def run_model(cls, model: ModelProto, inputs: Any, device: str = "CPU", **options: Any) -> tuple[Any, ...]:
        """Prepare and run."""
        return cls.prepare(model, device, **options).run(inputs)

    @classmethod
    def run_node(
        cls, node: NodeProto, inputs: Any, device: str = "CPU", outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None, **options: Any
    ) -> tuple[Any, ...]:
        """One node alone; `outputs_info`: (numpy type, shape) per output, found by onnxruntime when left out."""
        super().run_node(node, inputs, device, outputs_info, **options)
        arrays = [np.asarray(value) for value in inputs]
        ports = [_port(name, value.dtype, value.shape) for name, value in zip(filter(None, node.input), arrays, strict=True)]
        names = [name for name in node.output if name]
        if outputs_info is None:
            results = [onnx.ValueInfoProto(name=name) for name in names]
        else:
            results = [_port(name, dtype, shape) for name, (dtype, shape) in zip(names, outputs_info, strict=True)]
        opset = options.pop("opset_version", onnx.defs.onnx_opset_version())
        imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(node.domain, 1)] if node.domain not in ("", "ai.onnx") else [])
        model = helper.make_model(helper.make_graph([node], "node", ports, results), opset_imports=imports)
        return NpuBackendRep(model, **options).run(arrays)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """The NPU is simulated: on the CPU."""
        return bool(Device(device).type == DeviceType.CPU)


def _port(name: str, dtype: Any, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


prepare = NpuBackend.prepare
run_model = NpuBackend.run_model
run_node = NpuBackend.run_node
supports_device = NpuBackend.supports_device
