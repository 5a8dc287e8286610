"""How property tests run: the same few examples each time, without looking for smaller failures.

To look longer: ``LSYNC_FUZZ=1000 python -m pytest tests/… -k any``, which draws that many times as
many examples, other ones each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

_MORE = int(os.environ.get("LSYNC_FUZZ", "0"))


def few(examples: int) -> settings:
    """Settings for so many examples."""
    return settings(
        max_examples=examples * max(1, _MORE),
        derandomize=not _MORE,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
