"""Command line, stages, verification and reports."""
