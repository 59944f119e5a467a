"""The model's own forward pass, layer by layer, and what flows through it."""
