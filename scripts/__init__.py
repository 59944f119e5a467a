"""Programs that make what the repository holds; run from its root, as `python -m scripts.NAME`."""
