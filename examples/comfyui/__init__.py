"""Lip sync nodes for ComfyUI.

Copy this folder to ``ComfyUI/custom_nodes/lsync`` and install the package into ComfyUI's Python:
``python -m pip install lsync-compile``.
"""

from lsync_compile.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
