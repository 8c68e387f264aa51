"""Imported once for all processes that trace ranks: libraries are made quiet before they are imported."""

import signal

from visionloom.common.quiet import quiet_libraries

quiet_libraries()
# Ctrl-C ends this process without a traceback, also in the seconds in which it imports torch.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from visionloom.forecast import imagine as imagine  # noqa: E402
