"""Benchmarks, their metrics, and one generation loop. A benchmark is one file here and registers by being there."""
