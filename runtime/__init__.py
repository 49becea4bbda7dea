"""The virtual NPU: a bit-accurate machine with timed queues, usable without the compiler.

The one big idea: values and cycles come from the same program; values are exact integers on every computer, and timing never changes them.
"""

from runtime.errors import RuntimeFault
from runtime.machine import Machine, Stop
from runtime.report import Counter, LayerReport, Report, make_report
from runtime.result import Result
from runtime.timing import Timeline, simulate

__all__ = ["Counter", "LayerReport", "Machine", "Report", "Result", "RuntimeFault", "Stop", "Timeline", "make_report", "simulate"]
