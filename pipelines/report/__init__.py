"""What people look at after a batch: one HTML file, or a section for a model card."""
