"""Tokenizers of Hugging Face folders as GGUF keys."""
