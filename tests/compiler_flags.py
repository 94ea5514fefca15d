"""What tests ask of the compiler, in their own process and in those that they start."""

QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Tests compile much and compute little: the older emitters, hardly optimised, take less than half the time for it.
A program in one piece takes a quarter less than one in up to 32, of which each has its copy of what they share.

`make run` and the benchmarks compile as users do.
"""
