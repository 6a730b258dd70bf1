"""One quantization method per file."""
