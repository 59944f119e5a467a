"""GGUF, the file that llama.cpp loads."""
