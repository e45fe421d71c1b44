"""Kernels of the routed experts for GPUs. Nothing is imported here: triton may be missing."""
