"""ShareGPT's and ms-swift's format: {"messages" or "conversations": [...], "images": [...], "videos": [...], "tools", "objects"}."""

from visionloom.data.convert.formats.llava import Llava


class ShareGpt(Llava):
    """Turns as {"role", "content"} or {"from", "value"}, contents as texts or lists of typed parts, calls of tools."""
