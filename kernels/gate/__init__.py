"""Top-k gate: softmax, correction bias, selection, normalisation."""

from chiasm.kernels.gate.reference import topk_gate

__all__ = ["topk_gate"]
