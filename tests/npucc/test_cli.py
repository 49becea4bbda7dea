"""The command line as a user meets it: what it prints where, what it writes, and which exit code it leaves with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

import npucc
from isa.target import load_target, target_names
from npucc import demo
from npucc.cli import app, main
from npucc.quantize import QuantizeOptions

MODEL, SAMPLES, CALIBRATION = str(demo.MODEL), str(demo.SAMPLES), str(demo.CALIBRATION)
COMMANDS = ("compile", "run", "eval", "inspect", "asm", "disasm", "check", "export", "targets", "ops", "demo")
REPORT = {"cycles", "macs", "utilization", "dram_read_bytes", "dram_write_bytes", "spm_peak_bytes", "energy_pj", "layers"}
LAYER = {"name", "op", "cycles", "ideal", "underuse", "fill", "dma_stall", "sync_stall", "macs", "dram_bytes"}


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Npucc = Callable[..., Done]


@pytest.fixture
def npucc_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npucc:
    """Runs `npucc` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPUCC_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


def check_report(report: dict[str, Any]) -> None:
    """The fields that scripts rely on, and that the parts sum to the whole."""
    assert set(report) >= REPORT
    assert all(set(layer) >= LAYER for layer in report["layers"])
    parts = ("ideal", "underuse", "fill", "dma_stall", "sync_stall")
    assert all(layer["cycles"] == sum(layer[part] for part in parts) for layer in report["layers"])
    assert report["cycles"] == sum(layer["cycles"] for layer in report["layers"])
    assert report["macs"] == sum(layer["macs"] for layer in report["layers"])
    assert 0 < report["utilization"] <= 1


# help and usage


def test_help_names_every_command(npucc_command: Npucc) -> None:
    done = npucc_command("--help")
    assert done.code == 0
    assert all(f"  {command} " in done.out for command in COMMANDS)
    assert "npucc demo" in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, npucc_command: Npucc) -> None:
    done = npucc_command(command, "--help")
    assert done.code == 0
    assert f"  npucc {command}" in done.out


def test_version(npucc_command: Npucc) -> None:
    assert npucc_command("--version").out.startswith("npucc ")


USAGE = {
    "no such command": (["fly"], "No such command 'fly'"),
    "no argument": (["run"], "Missing argument 'OUT.npu'"),
    "no such option": (["compile", MODEL, "--speed"], "No such option: --speed"),
    "no such file": (["compile", "nothere.onnx"], "'nothere.onnx' does not exist"),
    "no such target": (["compile", MODEL, "--target", "moon"], "no target 'moon'\n  hint: known: "),
    "no shape": (["compile", MODEL, "--shape", "image"], "'image' is no shape; write the input's name and its sizes: x=1,3,224,224"),
    "negative shape": (["compile", MODEL, "--shape", "image=1,-3,4,4"], "'image=1,-3,4,4' is no shape"),
    "shape twice": (["compile", MODEL, "--shape", "image=1,3", "--shape", "image=1,3"], "input 'image' is given twice"),
    "no such stage": (["compile", MODEL, "--dump-after", "lunch"], "'lunch' is no stage; the stages are import, "),
    "no such quantization option": (["compile", MODEL, "--quant", "flavour=mint"], "'flavour=mint' is no quantization option"),
    "no such folder": (["compile", MODEL, "-o", "no/such/folder.npu"], "the folder 'no/such' does not exist"),
    "over the model": (["compile", MODEL, "-o", MODEL], "is the model itself"),
    "no such data": (["compile", MODEL, "--calibration", "nothere.npz"], "'nothere.npz' does not exist"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_2(case: str, npucc_command: Npucc, tmp_path: Path) -> None:
    arguments, message = USAGE[case]
    done = npucc_command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not list(tmp_path.iterdir())


def faulty_files(folder: Path, package: Path) -> None:
    """What a user could give us by mistake, or worse."""
    (folder / "junk.onnx").write_bytes(b"this is no model")
    (folder / "junk.npu").write_bytes(b"this is no package")
    (folder / "cut.npu").write_bytes(package.read_bytes()[:5000])
    (folder / "junk.npuasm").write_text(".npu 1\njunk\n")
    (folder / "bytes.npuasm").write_bytes(b".npu 1\n\xff\xfe")
    (folder / "junk.toml").write_text("rows = 'many'\n")
    np.savez(folder / "other.npz", picture=np.zeros((1, 3, 32, 32), np.float32))
    np.savez(folder / "nan.npz", image=np.full((1, 3, 32, 32), np.nan, np.float32))


FAULTS = {
    "junk model": (["compile", "junk.onnx"], "junk.onnx: this is not an ONNX model"),
    "junk package": (["run", "junk.npu"], "junk.npu: this is not a .npu package"),
    "cut package": (["inspect", "cut.npu"], "cut.npu: the zip container is damaged or cut short"),
    "junk text": (["asm", "junk.npuasm"], "junk.npuasm:2:1: "),
    "junk text to check": (["check", "junk.npuasm"], "junk.npuasm:2:1: "),
    "bytes for text": (["asm", "bytes.npuasm"], "bytes.npuasm: byte 7 is not UTF-8 text"),
    "bytes for text to check": (["check", "bytes.npuasm"], "bytes.npuasm: byte 7 is not UTF-8 text"),
    "junk target": (["compile", MODEL, "--target", "junk.toml"], "junk.toml: rows is 'many'"),
    "other input": (["run", "shapes.npu", "--input", "other.npz"], "other.npz: there is no array 'image'; the file holds 'picture'"),
    "not a number": (["run", "shapes.npu", "--input", "nan.npz", "-o", "out.npz"], "nan.npz, sample 0: input 'image' is nan at [0, 0, 0, 0]"),
    "other shape": (["compile", MODEL, "--shape", "image=1,3,64,64"], "shape (1, 3, 64, 64) does not fit input 'image'"),
    "pruning": (["compile", MODEL, "--prune", "2:4"], "pruning needs calibration data"),
    "junk reference": (
        ["eval", "shapes.npu", "--reference", "junk.onnx", "--data", SAMPLES],
        "junk.onnx: onnxruntime can't load the reference model",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faulty_files_are_1(case: str, npucc_command: Npucc, tmp_path: Path, demo_file: Path) -> None:
    """One message on standard error, no traceback, nothing written."""
    shutil.copy(demo_file, tmp_path / "shapes.npu")
    faulty_files(tmp_path, demo_file)
    before = sorted(tmp_path.iterdir())
    arguments, message = FAULTS[case]
    done = npucc_command(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {message}") or f": {message}" in done.err
    assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_our_own_bugs_say_so(npucc_command: Npucc, demo_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise KeyError(path.name)

    monkeypatch.setattr("npucc.cli.inspection.load", broken, raising=False)
    monkeypatch.setattr("npucc.package.load", broken)
    done = npucc_command("inspect", demo_file)
    assert done.code == 1
    assert done.err.startswith("error: this is a bug in npucc: KeyError: 'shapes.npu'\n  hint: run again with NPUCC_DEBUG=1")
    assert "Traceback" not in done.err
    monkeypatch.setenv("NPUCC_DEBUG", "1")
    assert "Traceback" in npucc_command("inspect", demo_file).err


def test_a_reader_that_has_seen_enough_is_no_error(demo_file: Path) -> None:
    command = f"{sys.executable} -m npucc disasm {demo_file} | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == ".npu 1\n"
    assert done.stderr == ""


def test_a_terminal_without_our_characters(demo_file: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "npucc", "inspect", str(demo_file), "--layers"], env=environment, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"stem/conv" in done.stdout


# compile


def test_compile_writes_the_same_bytes_every_time(npucc_command: Npucc, tmp_path: Path) -> None:
    for name in ("a.npu", "b.npu"):
        assert npucc_command("compile", MODEL, "--calibration", CALIBRATION, "-o", name).code == 0
    assert (tmp_path / "a.npu").read_bytes() == (tmp_path / "b.npu").read_bytes()


def test_compile_json(npucc_command: Npucc, tmp_path: Path) -> None:
    done = npucc_command("compile", MODEL, "-c", CALIBRATION, "--target", "tiny", "--quant", "int8", "--json")
    assert done.code == 0
    check_report(done.json)
    assert done.json["output"] == "shapes.npu"
    assert (done.json["target"], done.json["calibration"]) == ("tiny", "data")
    assert npucc.load(tmp_path / "shapes.npu").program.target.name == "tiny"


def test_missing_calibration_is_said_everywhere(npucc_command: Npucc, tmp_path: Path) -> None:
    compiled = npucc_command("compile", MODEL, "--json")
    assert "warning: no --calibration" in compiled.err
    assert compiled.json["calibration"] == "synthetic"
    assert npucc.load(tmp_path / "shapes.npu").contents.manifest["calibration"] == "synthetic"
    evaluated = npucc_command("eval", "shapes.npu", "--reference", MODEL, "--data", SAMPLES, "--limit", "5", "--layer-samples", "0")
    assert "made-up inputs" in evaluated.err
    assert "synthetic calibration" in evaluated.out
    assert "SYNTHETIC" in npucc_command("inspect", "shapes.npu").out


@pytest.mark.parametrize("stage", [stage.name for stage in npucc.stages()])
def test_dump_after_every_stage(stage: str, npucc_command: Npucc, tmp_path: Path) -> None:
    """Without -o the compiler stops there and writes nothing."""
    done = npucc_command("compile", MODEL, "--dump-after", stage)
    assert done.code == 0
    assert done.out.startswith(".npu 1\n" if stage in ("lower", "check") else "graph 'shapes'\n")
    assert "stem/conv" in done.out
    assert not list(tmp_path.iterdir())


def test_dump_after_with_an_output_goes_on(npucc_command: Npucc, tmp_path: Path) -> None:
    done = npucc_command("compile", MODEL, "--dump-after", "import", "-o", "a.npu", "--json")
    assert done.json["dump"].startswith("graph 'shapes'\n")
    assert (tmp_path / "a.npu").is_file()


def test_quantization_options_explain_themselves(npucc_command: Npucc) -> None:
    done = npucc_command("compile", "--quant", "help")
    assert done.code == 0
    for field in dataclasses.fields(QuantizeOptions):
        assert f"{field.name}={field.default}\n    " in done.out


def test_quantization_options_are_used(npucc_command: Npucc) -> None:
    arguments = ("compile", MODEL, "-c", CALIBRATION, "-o")
    assert npucc_command(*arguments, "a.npu", "--quant", "int8,method=minmax,samples=4").code == 0
    assert npucc_command(*arguments, "b.npu", "--quant", "int8").code == 0
    assert npucc.load("a.npu").program.inputs != npucc.load("b.npu").program.inputs


def dynamic_model(path: Path) -> None:
    """The bundled model with an open batch size."""
    model = onnx.load(MODEL)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.save(model, path)


def test_open_sizes(npucc_command: Npucc, tmp_path: Path) -> None:
    dynamic_model(tmp_path / "open.onnx")
    refused = npucc_command("compile", "open.onnx")
    assert refused.code == 1
    assert "hint: bind it: --shape image=1,3,32,32" in refused.err
    arguments = ("compile", "open.onnx", "--quant", "int8", "-o")
    assert npucc_command(*arguments, "given.npu", "--shape", "image=1,3,32,32").code == 0
    assert npucc_command(*arguments, "found.npu", "-c", CALIBRATION).code == 0
    assert npucc.load("found.npu").inputs[0].shape == (1, 3, 32, 32)
    assert npucc_command(*arguments, "four.npu", "-c", CALIBRATION, "--shape", "image=4,3,32,32").code == 0
    assert npucc.load("four.npu").inputs[0].shape == (4, 3, 32, 32)


def test_an_own_target(npucc_command: Npucc, tmp_path: Path) -> None:
    text = npucc_command("targets", "edge").out
    (tmp_path / "mine.toml").write_text(text.replace("rows = 32", "rows = 16").replace("cols = 32", "cols = 16"))
    done = npucc_command("compile", MODEL, "--target", "mine.toml", "--json")
    assert done.json["target"] == "mine"
    assert npucc.load("shapes.npu").program.target == dataclasses.replace(load_target("edge"), name="mine", rows=16, cols=16)


# run


def test_run_json_and_outputs(npucc_command: Npucc, tmp_path: Path, demo_file: Path, demo_package: npucc.Package) -> None:
    done = npucc_command("run", demo_file, "--input", SAMPLES, "--limit", "3", "-o", "out.npz", "--json")
    check_report(done.json)
    assert (done.json["samples"], done.json["input"]) == (3, "data")
    with np.load(tmp_path / "out.npz") as out, np.load(SAMPLES) as samples:
        assert out["logits"].shape == (3, 1, 10)
        for index in range(3):
            wanted = demo_package.run({"image": samples["image"][index : index + 1]}).outputs["logits"]
            assert np.array_equal(out["logits"][index], wanted)


def test_run_without_input_says_so(npucc_command: Npucc, demo_file: Path) -> None:
    done = npucc_command("run", demo_file)
    assert done.code == 0
    assert "made-up sample" in done.err
    assert all(word in done.out for word in ("cycles", "utilization", "scratchpad peak", "estimated", "Horowitz", "the 10 longest of"))
    assert npucc_command("run", demo_file, "--json").json["input"] == "synthetic"


def test_run_shows_all_layers_if_asked(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    out = npucc_command("run", demo_file, "--all").out
    assert all(layer.name in out for layer in demo_package.report.layers)
    assert "longest" not in out


def test_run_trace_and_tensors(npucc_command: Npucc, tmp_path: Path, demo_file: Path, demo_package: npucc.Package) -> None:
    assert npucc_command("run", demo_file, "--trace", "trace.json", "--dump-tensors", "tensors/here").code == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") == demo_package.report.cycles
    folder = tmp_path / "tensors" / "here"
    index = json.loads((folder / "index.json").read_text())
    records = {record.name: record for record in (*demo_package.program.tensors, *demo_package.program.outputs)}
    assert {entry["name"] for entry in index} == set(records)
    for entry in index:
        assert np.load(folder / entry["file"]).shape == records[entry["name"]].tile.shape


def test_run_stops_after_a_line(npucc_command: Npucc, tmp_path: Path, demo_file: Path, demo_package: npucc.Package) -> None:
    lines = npucc.load(tmp_path / demo_file).text.splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.split()[:1] == ["requant"])
    done = npucc_command("run", demo_file, "--input", SAMPLES, "--until", f"{line}", "--dump-memory", "here", "--json").json
    assert (done["instruction"], done["line"]) == ("requant", line)
    assert 0 < done["cycle"] < demo_package.report.cycles
    result, sums = (np.load(tmp_path / "here" / f"operand_{name}.npy") for name in ("y", "a"))
    assert (result.dtype, sums.dtype, result.shape) == (np.int8, np.int32, sums.shape)
    assert (tmp_path / "here" / "spm.bin").stat().st_size == demo_package.program.target.spm_bytes
    assert len(np.unique(sums)) > 9  # sums are stored, though a whole run would pass them on unstored
    assert f"line {line} is executed" in npucc_command("run", demo_file, "--until", f"{line}:99999").err


def test_run_counts_instructions(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    rows = {row["instruction"]: row for row in npucc_command("run", demo_file, "--json").json["counters"]}
    assert sum(row["count"] for row in rows.values()) == len(demo_package.machine.steps)
    assert rows["conv"]["engine"] == "mm"
    assert "conv" in npucc_command("run", demo_file, "--counters").out


def test_run_bounds_the_cycles(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    cycles = demo_package.report.cycles
    assert npucc_command("run", demo_file, "--max-cycles", str(cycles)).code == 0
    done = npucc_command("run", demo_file, "--max-cycles", str(cycles - 1))
    assert (done.code, done.err.splitlines()[0]) == (1, f"error: the program takes {cycles:,} cycles")


# eval


def test_eval_json(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    done = npucc_command("eval", demo_file, "--reference", MODEL, "--data", SAMPLES, "--limit", "40", "--layer-samples", "1", "--json").json
    assert set(done["outputs"]["logits"]) >= {"sqnr_db", "cosine", "max_abs", "top1_agreement"}
    assert done["outputs"]["logits"]["sqnr_db"] > 20
    assert done["accuracy_drop_points"] == pytest.approx(100 * (done["float_accuracy"] - done["npu_accuracy"]))
    assert {layer["name"] for layer in done["layers"]} == set(demo_package.graph.nodes)
    assert all({"accumulated_db", "single_db"} <= set(layer) for layer in done["layers"])


def test_eval_tables(npucc_command: Npucc, demo_file: Path) -> None:
    done = npucc_command("eval", demo_file, "-r", MODEL, "-d", SAMPLES, "--limit", "5", "--layer-samples", "1")
    assert done.code == 0
    assert all(word in done.out for word in ("float accuracy", "NPU accuracy", "drop", "SQNR dB", "single dB"))


def test_eval_shows_every_layer_with_what_was_done_for_it(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    arguments = ("eval", demo_file, "-r", MODEL, "-d", SAMPLES, "--limit", "5", "--layer-samples", "1")
    done = npucc_command(*arguments, "--layers")
    assert done.code == 0
    assert all(word in done.out for word in ("saturated", "covered", "remedy", f"{len(demo_package.graph.nodes)} nodes"))
    decided = npucc_command(*arguments, "--json").json["quantized"]
    assert decided == demo_package.quantized
    wide = {name for name, tensor in demo_package.graph.tensors.items() if tensor.quant and tensor.quant.dtype == "s16" and not tensor.is_constant}
    assert {row["name"] for row in decided["tensors"] if row["dtype"] == "s16"} <= wide
    assert {name for each in decided["mixed"]["chosen"] for name in each["tensors"]} == wide


def test_eval_with_the_wrong_model(npucc_command: Npucc, demo_file: Path, tmp_path: Path) -> None:
    model = onnx.load(MODEL)
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    onnx.save(model, tmp_path / "other.onnx")
    done = npucc_command("eval", demo_file, "-r", "other.onnx", "-d", SAMPLES, "--limit", "5")
    assert done.code == 1
    assert "the reference model has no input 'image'" in done.err


# inspect, asm, disasm, check, export


def test_inspect(npucc_command: Npucc, demo_file: Path, demo_package: npucc.Package) -> None:
    summary = npucc_command("inspect", demo_file).out
    assert all(word in summary for word in ("image float32[1,3,32,32]", "logits float32[1,10]", "calibration", "from data", "cycles"))
    assert npucc_command("inspect", demo_file, "--asm").out == demo_package.text
    assert npucc_command("inspect", demo_file, "--graph").out.startswith(demo_package.graph.text())
    assert "(constants)" in npucc_command("inspect", demo_file, "--memory").out
    assert all(layer.name in npucc_command("inspect", demo_file, "--layers").out for layer in demo_package.program.layers)


def test_inspect_json(npucc_command: Npucc, demo_file: Path) -> None:
    value = npucc_command("inspect", demo_file, "--json", "--asm", "--graph", "--memory").json
    check_report(value)
    assert value["inputs"][0]["shape"] == [1, 3, 32, 32]
    assert value["asm"].startswith(".npu 1\n")
    assert value["graph"].startswith("graph 'shapes'\n")
    assert {region["kind"] for region in value["memory"]} == {"input", "output", "tensor", "constants"}


def test_disasm_then_asm(npucc_command: Npucc, tmp_path: Path, demo_file: Path, demo_package: npucc.Package) -> None:
    assert npucc_command("disasm", demo_file).out == demo_package.text
    assert npucc_command("disasm", demo_file, "-o", "a.npuasm", "--constants", "a.bin").code == 0
    assert npucc_command("asm", "a.npuasm", "--constants", "a.bin", "-o", "from_bin.npu").code == 0
    assert npucc_command("asm", "a.npuasm", "--constants", demo_file).code == 0
    assert (tmp_path / "from_bin.npu").read_bytes() == (tmp_path / "a.npu").read_bytes()
    feed = {"image": np.ones((1, 3, 32, 32), np.float32)}
    assert np.array_equal(npucc.load("a.npu").run(feed).raw["logits"], demo_package.run(feed).raw["logits"])
    missing = npucc_command("asm", "a.npuasm")
    assert missing.code == 1
    assert "constants" in missing.err


def test_an_assembled_package_has_no_graph(npucc_command: Npucc, demo_file: Path) -> None:
    npucc_command("disasm", demo_file, "-o", "a.npuasm")
    npucc_command("asm", "a.npuasm", "--constants", demo_file)
    refused = npucc_command("export", "a.npu", "-o", "q.onnx")
    assert refused.code == 1
    assert "the package has a program but no graph" in refused.err
    evaluated = npucc_command("eval", "a.npu", "-r", MODEL, "-d", SAMPLES, "--limit", "3", "--json")
    assert evaluated.code == 0
    assert evaluated.json["layers"] == []
    assert "no errors per layer" in evaluated.err


def test_check(npucc_command: Npucc, tmp_path: Path, demo_file: Path, demo_package: npucc.Package) -> None:
    assert npucc_command("check", demo_file).out == f"{demo_file}: {len(demo_package.program.layers)} layers, no findings\n"
    assert npucc_command("check", demo_file, "--json").json == {"ok": True, "findings": [], "warnings": []}
    (tmp_path / "racy.npuasm").write_text(demo_package.text.replace(" wait=mm.0", "", 1))
    done = npucc_command("check", "racy.npuasm")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: racy.npuasm:")
    findings = npucc_command("check", "racy.npuasm", "--json")
    assert findings.code == 1
    assert findings.json["ok"] is False
    assert findings.json["findings"][0]["message"]


def test_check_tells_every_mistake_with_its_place(npucc_command: Npucc, tmp_path: Path) -> None:
    example = (Path(__file__).parents[2] / "examples" / "matmul.npuasm").read_text(encoding="utf-8")
    wrong = {"matmul  $0x0": "matmull $0x0", "za=-3 ": "zaa=-3", "wait=vec.0 signal=vec.0": "wait=vecc.0", "%0xe00:s8[8,32]": "%0xe00:s9[8,32]"}
    text = example
    for right, mistake in wrong.items():
        text = text.replace(right, mistake, 1)
    (tmp_path / "wrong.npuasm").write_text(text, encoding="utf-8")
    told = npucc_command("check", "wrong.npuasm").err
    places = sorted(_place(text, mistake) for mistake in ("matmull", "vecc.0", "s9"))
    assert [line.split(" ")[1] for line in told.splitlines() if line.startswith("error")] == [f"wrong.npuasm:{at}:" for at in places]
    assert told.count("did you mean") >= 2
    far = example.replace("%0xd00:s8[8,32], $0x0", "%0x9000:s8[8,32], $0x0", 1)
    (tmp_path / "far.npuasm").write_text(far, encoding="utf-8")
    assert f"far.npuasm:{_place(far, '%0x9000')}: operand y, %0x9000, reaches" in npucc_command("check", "far.npuasm").err


def _place(text: str, found: str) -> str:
    """line:column, from 1."""
    before = text[: text.index(found)]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def test_export(npucc_command: Npucc, tmp_path: Path, demo_file: Path) -> None:
    assert npucc_command("export", demo_file, "-o", "q.onnx").code == 0
    model = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(model)
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}


# targets, ops, demo


def test_targets(npucc_command: Npucc) -> None:
    listed = npucc_command("targets").out
    assert all(name in listed for name in target_names())
    assert [chip["name"] for chip in npucc_command("targets", "--json").json] == target_names()


@pytest.mark.parametrize("name", target_names())
def test_a_printed_target_is_the_target(name: str, npucc_command: Npucc, tmp_path: Path) -> None:
    (tmp_path / f"{name}.toml").write_text(npucc_command("targets", name).out)
    assert load_target(tmp_path / f"{name}.toml") == load_target(name)
    assert npucc_command("targets", name, "--json").json == dataclasses.asdict(load_target(name))


def test_ops(npucc_command: Npucc) -> None:
    assert "Conv" in npucc_command("ops").out
    value = npucc_command("ops", "--target", "cube", "--json").json
    assert {"Conv", "Gemm", "Softmax"} <= {entry["name"] for entry in value["onnx"]}
    assert {"name": "conv", "meaning": "2-D convolution (x, w[N,C/g,kh,kw], bias)", "engine": "matrix engine"} in value["graph"]
    assert "4096 MACs per cycle" in npucc_command("ops", "--target", "cube").out


def test_demo(npucc_command: Npucc, tmp_path: Path) -> None:
    done = npucc_command("demo", "--limit", "20", "-o", "shapes.npu")
    assert done.code == 0
    assert all(word in done.out for word in ("float accuracy", "NPU accuracy", "drop", "cycles", "utilization", "energy", "conv ", "ONNX nodes"))
    assert (tmp_path / "shapes.npu").is_file()


def test_only_the_demos_own_data_is_needed(tmp_path: Path) -> None:
    """As a new user runs it: another process, another folder, nothing in the environment."""
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "npucc", "demo", "--limit", "20", "--target", "cube", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    check_report(value)
    assert value["npu_accuracy"] > 0.7


def test_every_registered_command_is_tested_here() -> None:
    assert sorted(COMMANDS) == sorted(command.name or "" for command in app.registered_commands)
