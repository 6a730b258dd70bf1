"""What executes a packed model for real."""
