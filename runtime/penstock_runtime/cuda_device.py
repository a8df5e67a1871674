"""The device that a worker computes on: found at start, or the reason why it cannot be used."""

from __future__ import annotations

import torch

from penstock_runtime.errors import ConfigurationError


def find_device(name: str) -> torch.device:
    """Return the device of `--device`, cpu or cuda; on CUDA the first that this process sees.

    Raises ConfigurationError, with cause and remedy, if there is none.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ConfigurationError(
            f"--device cuda: this build of torch ({torch.__version__}) has no CUDA; install "
            "torch with CUDA (the default wheels for Linux have it), or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "--device cuda: no CUDA device can be used here. Is the NVIDIA driver loaded "
            f"(nvidia-smi), new enough for CUDA {torch.version.cuda}, and a GPU given to this "
            "process (resources.gpu in the manifest, CUDA_VISIBLE_DEVICES)? Or use --device cpu"
        )
    return torch.device("cuda", 0)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that nobody holds, this process's caches given back."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
