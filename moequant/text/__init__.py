"""Calibration and evaluation text, as rows of a model's own tokens."""
