"""What a stream that is not what was written raises."""


class DamagedError(ValueError):
    """A stored stream is not what was written."""
