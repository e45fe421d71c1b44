"""chiasm: ERNIE-4.5-VL served as separate services, cut along the seam between its modalities."""
