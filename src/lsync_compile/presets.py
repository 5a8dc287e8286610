"""The presets: what each changes against the options' defaults.

docs/performance.md has the measurements behind them.
"""

from __future__ import annotations

from typing import Any

# Chunks after the first take 5 and 3 of 20 steps, turbo's with guidance in the first alone.
_REGION = {"lip_attention": True, "crop_decode": True}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"temporal_start": "path", "temporal_strength": 0.25, **_REGION},
    "turbo": {
        "temporal_start": "path",
        "temporal_strength": 0.15,
        "guided_steps": 1,
        "crop_encode": True,
        **_REGION,
    },
}
