"""Where networks run."""

import torch


def best_device() -> torch.device:
    """The GPU if there is one, with full float32 products and the same answer each time; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")
