"""ViT-MSN from a PyTorch checkpoint to a proven ONNX graph and TensorRT engine."""

__version__ = "0.1.0"
