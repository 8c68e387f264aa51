"""Keep what libraries say about themselves off the user's screen: absent accelerators, old syntax, planned removals.

Only warnings are held back, never errors. What `python -W` or PYTHONWARNINGS say about warnings goes before this file.
"""

import logging
import os
import sys
import warnings

OURS = r"visionloom\.|__main__"
# megatron announces its defaults and planned removals, the second says at import that there is no GPU.
TALKATIVE_LOGGERS = ("megatron", "torch.utils.cpp_extension")


def quiet_libraries() -> None:
    """Show only warnings that arise in visionloom's own modules; call it before torch is imported."""
    if not sys.warnoptions:
        # A SyntaxWarning names its file instead of its module, so libraries cannot be told by name: all but ours are meant.
        warnings.filterwarnings("ignore", module=rf"(?!{OURS})")
    for name in TALKATIVE_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo and NCCL print their connections at a lower level
