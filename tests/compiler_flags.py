"""What tests ask of the compiler, in their own process and in those that they start."""

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Tests compile much and compute little: the older emitters, hardly optimised, take less than half the time for it.

`make run` and the benchmarks compile as users do.
"""
