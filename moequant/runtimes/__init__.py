"""Programs that run our files."""
