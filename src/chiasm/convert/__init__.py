"""From a checkpoint in full width to one whose routed experts are in low precision.

    plan.py       which tensors go into which file, in what format; decided before weights are read
    encode.py     one matrix in its new format, and what that cost it
    stream.py     carries out a plan, expert by expert; a run that was killed goes on where it was
    report.py     what the conversion did to the weights
    memory.py     whether whole models fit, before they are read
    model.py      the whole model in this process, for calibration and quality
    calibrate.py  the mean squares of every expert's inputs, which weigh the errors
    quality.py    answers before and after, side by side

docs/quantization.md says how it is used.
"""
