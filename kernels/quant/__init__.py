"""Matrices of routed experts, in full width and in low precision.

    formats.py    stacks of matrices as kernels see them; `dequantize` is the specification
    cpu.py        products on a CPU, by kernels/native where there is a compiler
    int8.py       one scale a row
    int4.py       groups of 128 along the input, asymmetric
    tcq2.py       two bits: a trellis-coded table, groups of 128 along the input
    table.py      that table, and how it was trained
    hadamard.py   rotation of the inputs, for weights with heavy tails
    wint2.py      Baidu's WINT2, read only

docs/quantization.md says what each of them costs.
"""
