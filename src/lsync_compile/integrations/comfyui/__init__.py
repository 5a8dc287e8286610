"""Nodes for ComfyUI. ``examples/comfyui`` is the folder for its ``custom_nodes``."""

from lsync_compile.integrations.comfyui.nodes import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
