"""Weights from safetensors files, of which each rank reads the parts that it keeps."""
