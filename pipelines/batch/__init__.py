"""Batches: pipeline files, the tasks they come to, and what became of them."""
