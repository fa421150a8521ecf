"""Adapters: read, check, merge lazily, and account for every tensor of them."""
