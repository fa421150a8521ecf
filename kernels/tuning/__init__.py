"""Launch parameters: where they come from, and how they are found."""
