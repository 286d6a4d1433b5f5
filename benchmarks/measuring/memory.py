"""Peak memory of what runs on the device."""

import torch


def start_peak() -> None:
    """Forget the peak so far, and give back what is only cached."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Largest memory in use since `start_peak`, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
