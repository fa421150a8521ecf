"""GPU kernels with a plain reference beside each; imports nothing of the project."""
