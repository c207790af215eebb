"""Models: their cards, where they are found, and the ONNX session that runs them."""
