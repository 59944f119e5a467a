"""llama.cpp: its library, its memory."""
