"""Benchmarks: official questions, answers in compiled batches, scores and their comparison."""
