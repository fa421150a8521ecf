"""One module per command of the `quantpress` program."""
