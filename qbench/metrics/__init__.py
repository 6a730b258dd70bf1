"""Raw measurements of a finished run."""
