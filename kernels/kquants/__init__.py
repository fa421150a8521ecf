"""llama.cpp's K-quant search on the GPU."""
