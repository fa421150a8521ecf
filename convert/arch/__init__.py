"""One table per model family; everything that depends on a family follows from its table."""
