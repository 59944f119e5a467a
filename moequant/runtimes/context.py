"""How many tokens a model is served with where nobody said."""

from __future__ import annotations

USUAL = 8192


def usual_context(limit: int | None) -> int:
    """Tokens of context: `USUAL`, or all that the model has where that is less; None: nobody knows."""
    return min(USUAL, limit or USUAL)
