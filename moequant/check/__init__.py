"""What packed bytes compute, against decoders, products and the model: the parts of `commands.check`."""
