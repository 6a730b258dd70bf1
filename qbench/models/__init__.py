"""Float models: what is built, its preprocessing, and the hash of its weights."""
