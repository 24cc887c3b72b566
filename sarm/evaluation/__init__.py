"""Benchmarks for reward models: preference files, RewardBench 2, RM-Bench."""
