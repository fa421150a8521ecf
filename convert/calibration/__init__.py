"""The forward pass over a calibration text, layer by layer, for the methods that need the inputs of linears."""
