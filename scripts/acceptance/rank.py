"""One rank of a run whose process group is chosen here: ``rank.py BACKEND RANK RANKS PORT FLAGS...``.

All ranks compute on the first GPU, which the package itself would refuse to share.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    backend, rank, ranks, port, *flags = arguments
    os.environ.update(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK="0", LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group(backend)
    from dual_loop.train_dual_loop import main as train

    return int(train(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
