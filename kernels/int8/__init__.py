"""Products of codes with codes: W8A8, and LLM.int8's columns apart."""
