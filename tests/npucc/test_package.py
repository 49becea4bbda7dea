"""The Python API: `npucc.compile`, the package it returns, and what survives being saved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import isa
import npucc
from isa.target import load_target
from npucc import demo, serialize
from npucc.files import replacing
from npucc.graph import Graph

Feed = dict[str, np.ndarray]


def images(count: int) -> Iterator[Feed]:
    with np.load(demo.SAMPLES) as samples:
        stored = samples["image"][:count].astype(np.float32)
    return ({"image": image[None]} for image in stored)


def test_a_result_has_what_the_contract_says(demo_package: npucc.Package) -> None:
    result = demo_package.run(next(images(1)))
    assert list(result.outputs) == list(result.raw) == list(demo_package.graph.outputs) == ["logits"]
    assert result.outputs["logits"].dtype == np.float32
    assert result.outputs["logits"].shape == (1, 10)
    assert result.raw["logits"].dtype == {"s8": np.int8, "s16": np.int16}[demo_package.graph.quant("logits").dtype]
    record = demo_package.program.outputs[0]
    real = (result.raw["logits"].astype(np.float32) - record.zero) * np.float32(record.scale)
    assert np.array_equal(result.outputs["logits"], real)
    assert result.cycles == sum(layer.cycles for layer in result.layers)
    assert result.macs == sum(layer.macs for layer in result.layers)
    assert 0 < result.utilization < 1
    assert min(result.energy_pj, result.dram_read_bytes, result.dram_write_bytes, result.spm_peak_bytes) > 0
    assert result.report == demo_package.report


def test_what_is_saved_is_what_was_compiled(demo_package: npucc.Package, tmp_path: Path) -> None:
    demo_package.save(tmp_path / "a.npu")
    loaded = npucc.load(tmp_path / "a.npu")
    assert loaded.contents.to_bytes() == demo_package.contents.to_bytes() == (tmp_path / "a.npu").read_bytes()
    assert loaded.text == demo_package.text
    assert loaded.graph.text() == demo_package.graph.text()
    assert loaded.refused == demo_package.refused
    assert loaded.calibration == "data"
    feed = next(images(1))
    assert np.array_equal(loaded.run(feed).raw["logits"], demo_package.run(feed).raw["logits"])
    assert loaded.to_onnx().SerializeToString(deterministic=True) == demo_package.to_onnx().SerializeToString(deterministic=True)


def test_the_text_is_the_program(demo_package: npucc.Package) -> None:
    assert isa.parse_program(demo_package.text) == isa.parse_program(isa.format_program(demo_package.program))
    assert demo_package.instructions == sum(
        line.startswith("  ") and line.split()[0] not in ("loop", "end") for line in demo_package.text.splitlines()
    )


def test_run_many_is_lazy_and_in_order(demo_package: npucc.Package) -> None:
    endless = itertools.cycle(images(2))
    first, second, third = itertools.islice(demo_package.run_many(endless), 3)
    assert np.array_equal(first.raw["logits"], third.raw["logits"])
    assert not np.array_equal(first.raw["logits"], second.raw["logits"])


def test_run_many_in_several_processes_gives_the_same_bytes(demo_package: npucc.Package) -> None:
    feeds = list(images(3))
    together = list(demo_package.run_many(iter(feeds), workers=2))
    assert [each.raw["logits"].tolist() for each in together] == [demo_package.run(feed).raw["logits"].tolist() for feed in feeds]
    assert together[0].cycles == demo_package.report.cycles


def test_tensors_are_kept_if_asked_for(demo_package: npucc.Package) -> None:
    feed = next(images(1))
    assert demo_package.run(feed).tensors == {}
    assert set(demo_package.run(feed, tensors=True).tensors) == {record.name for record in demo_package.program.tensors}


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "input 'image' is missing\n  hint: the inputs are image float32[1,3,32,32]"),
        ({"image": np.zeros((3, 32, 32))}, "input 'image' has shape [3, 32, 32]\n  hint: expected image float32[1,3,32,32]"),
        ({"image": np.zeros((1, 3, 32, 32)), "mask": 1}, "'mask' is not an input"),
    ],
)
def test_inputs_that_do_not_fit(feed: Feed, message: str, demo_package: npucc.Package) -> None:
    with pytest.raises(npucc.DataError) as caught:
        demo_package.run(feed)
    assert message in str(caught.value)


def test_the_exported_model_computes_the_same(demo_package: npucc.Package) -> None:
    """onnxruntime on the QDQ model is an independent oracle: one stored step is the most that a few outputs differ."""
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(demo_package.to_onnx().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    scale = np.float32(demo_package.program.outputs[0].scale)
    differences = []
    for feed in images(30):
        (wanted,) = session.run(["logits"], feed)
        differences.append(np.rint((demo_package.run(feed).outputs["logits"] - wanted) / scale))
    assert np.abs(differences).max() <= 1
    assert np.mean(np.array(differences) != 0) < 0.02


def test_calibration_may_be_any_iterable() -> None:
    """A list, a generator and the file that they come from give the same bytes."""
    with np.load(demo.CALIBRATION) as data:
        feeds = [{"image": image[None].astype(np.float32)} for image in data["image"]]
    from_list, from_iterator = (npucc.compile(demo.MODEL, calibration=each, quant="int8").contents.to_bytes() for each in (feeds, iter(feeds)))
    from_file = npucc.compile(onnx.load(demo.MODEL), calibration=demo.CALIBRATION, quant="int8").contents.to_bytes()
    assert from_list == from_iterator == from_file


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ([], "the calibration data holds no feed"),
        ([{"image": np.zeros((1, 3, 32, 32)), "x": 1}], "'x' is not an input"),
        ([{"image": np.zeros((1, 3, 32))}], "input 'image' has shape [1, 3, 32]"),
        ([{"image": np.zeros((1, 3, 32, 32))}, {"image": np.full((1, 3, 32, 32), np.nan)}], "calibration sample 1: input 'image' is nan"),
    ],
)
def test_calibration_that_does_not_fit(feeds: list[Feed], message: str) -> None:
    with pytest.raises(npucc.QuantizeError) as caught:
        npucc.compile(demo.MODEL, calibration=feeds)
    assert message in str(caught.value)


def test_open_sizes_are_bound_by_shapes_or_by_the_feeds() -> None:
    model = onnx.load(demo.MODEL)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    assert npucc.compile(model, shapes={"image": (2, 3, 32, 32)}).inputs[0].shape == (2, 3, 32, 32)
    assert npucc.compile(model, calibration=[{"image": np.ones((2, 3, 32, 32))}]).inputs[0].shape == (2, 3, 32, 32)
    with pytest.raises(npucc.ImportModelError, match="bind it: --shape image=1,3,32,32"):
        npucc.compile(model)


def test_a_target_may_be_a_value_and_changes_no_result(demo_package: npucc.Package) -> None:
    slim = dataclasses.replace(load_target("edge"), name="slim", rows=8, cols=8, spm_bytes=1 << 17)
    other = npucc.compile(demo.MODEL, slim, calibration=demo.CALIBRATION)
    assert other.report.cycles > demo_package.report.cycles
    for feed in images(3):
        assert np.array_equal(other.run(feed).raw["logits"], demo_package.run(feed).raw["logits"])


def test_steps_are_the_stages_in_order() -> None:
    steps = list(npucc.steps(demo.MODEL))
    assert [step.stage for step in steps] == [stage.name for stage in npucc.stages()]
    assert all(isinstance(step.value, Graph) for step in steps[:-2])
    assert isinstance(steps[-2].value, isa.Program)
    assert isinstance(steps[-1].value, npucc.Package)
    assert all(stage.why for stage in npucc.stages())


def test_pruning_without_data_is_refused_not_ignored() -> None:
    with pytest.raises(npucc.PruneError, match="pruning needs calibration data"):
        npucc.compile(demo.MODEL, prune="channels=30%")


def test_a_package_without_a_graph(demo_package: npucc.Package) -> None:
    bare = npucc.Package(isa.Package(demo_package.program, demo_package.contents.constants), "bare.npu")
    assert bare.calibration == "unknown"
    assert bare.refused == ()
    with pytest.raises(npucc.CompileError, match=r"bare.npu: the package has a program but no graph"):
        bare.to_onnx()


def test_a_damaged_graph_is_found_when_it_is_used(demo_package: npucc.Package) -> None:
    members = {**demo_package.contents.members, serialize.JSON_NAME: b"{}"}
    package = npucc.Package(dataclasses.replace(demo_package.contents, members=members))
    assert package.run(next(images(1))).cycles
    with pytest.raises(isa.PackageError, match=r"graph.json: version is None, expected 1"):
        package.to_onnx()


def test_a_manifest_that_is_odd_is_not_believed(demo_package: npucc.Package) -> None:
    package = npucc.Package(dataclasses.replace(demo_package.contents, manifest={"calibration": ["data"], "refused": {"a": 1}}))
    assert package.calibration == "unknown"
    assert package.refused == ()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as stream:
            stream.write(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
