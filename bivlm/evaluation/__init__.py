"""Benchmarks, their metrics, and one generation loop. A benchmark is one file here and registers by being there."""

from bivlm.evaluation.benchmark import Benchmark, benchmark_kinds, load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import Evaluation, evaluate, read_outcomes, write_outcomes

__all__ = [
    "Benchmark",
    "Evaluation",
    "benchmark_kinds",
    "evaluate",
    "load_benchmark",
    "load_model",
    "read_outcomes",
    "write_outcomes",
]
