"""What every rank of the pool imports; the process that ranks are forked from does it once for all of them."""

import os

from visionloom.common.quiet import quiet_libraries


def prepare() -> None:
    """Import what ranks use, without starting a thread: a process that has some is not forked safely."""
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet_libraries()
    import torch

    import visionloom.tests.train.layouts
    import visionloom.train.build
    import visionloom.train.run  # noqa: F401
    from visionloom.parallel import stand_in

    torch.set_num_threads(1)
    stand_in.install()


prepare()
