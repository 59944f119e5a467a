"""How many weights a format sees at a time, and which of its functions are compiled."""

from __future__ import annotations

# Weights per tile, by device: on a CPU a tile and its weights stay in the second-level cache.
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
