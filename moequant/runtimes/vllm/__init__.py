"""vLLM: its memory."""
