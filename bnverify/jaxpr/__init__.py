"""Read a traced step: shapes, data flow between leaves, rounding error, slopes."""

from bnverify.jaxpr.influence import INPUTS, Influence, Link, influence
from bnverify.jaxpr.rounding import Rounded, Rounding, rounding
from bnverify.jaxpr.shapes import Run, TraceError, Traces, trace_at, trace_subject
from bnverify.jaxpr.slope import Slope, directional_derivative
from bnverify.jaxpr.tracing import Abstract, Program, leaf_names, trace

__all__ = [
    "INPUTS",
    "Abstract",
    "Influence",
    "Link",
    "Program",
    "Rounded",
    "Rounding",
    "Run",
    "Slope",
    "TraceError",
    "Traces",
    "directional_derivative",
    "influence",
    "leaf_names",
    "rounding",
    "trace",
    "trace_at",
    "trace_subject",
]
