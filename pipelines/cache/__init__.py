"""What runs keep for later ones: entries found by their content, checked when they are read."""
