"""What calibration text shows: where the router sends tokens and what every weight is fed."""
