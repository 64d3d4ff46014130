"""The worker of ``scripts/gpu_acceptance.py`` with an emulated GPU in it."""

from __future__ import annotations

from emulated_build import load_device

load_device()

import torch  # noqa: E402
from emulated_device import EmulatedGpu  # noqa: E402

from acceptance.worker import main  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    with EmulatedGpu():
        main()
