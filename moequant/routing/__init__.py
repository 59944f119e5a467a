"""Calibration: what the router does and what every weight is fed."""
