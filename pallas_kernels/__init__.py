"""Kernels: arrays in, arrays out. Knows shapes, not models; imports jax alone."""
