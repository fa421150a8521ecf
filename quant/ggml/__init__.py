"""Block formats of ggml: each type quantizes rows of float32 to packed bytes and back."""
