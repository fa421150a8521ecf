"""ONNX: packing of quantized matrices."""
