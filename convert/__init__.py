"""Reads and writes model files; knows architectures."""
