"""GGUF, the file format of llama.cpp: reading, writing, metadata and vocabulary."""
