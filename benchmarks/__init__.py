"""Measurements: ratios taken side by side in one run, with the machine stated."""
