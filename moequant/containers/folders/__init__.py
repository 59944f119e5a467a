"""Folders of safetensors for vLLM and transformers."""
