"""LatentSync's own pipeline with lsync: run its inference script, compiled.

    cd LatentSync
    python /path/to/examples/latentsync_repository.py \
        --unet_config_path configs/unet/stage2_512.yaml \
        --inference_ckpt_path checkpoints/latentsync_unet.pt \
        --video_path in.mp4 --audio_path speech.wav --video_out_path out.mp4

The arguments are those of its ``scripts/inference.py``, which is left as it is. In a script of
your own, the two lines are::

    import torch
    pipeline = torch.compile(pipeline, backend="lsync")

``$LSYNC_OPTIONS`` takes options as JSON, such as ``{"deep_cache": true}``. Its own
``--enable_deepcache`` is refused: both would cache the same features.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    root = Path.cwd()
    script = root / "scripts" / "inference.py"
    if not script.is_file():
        sys.exit(f"{root} is no checkout of LatentSync's repository: {script} is not there")
    sys.path.insert(0, str(root))
    options = json.loads(os.environ.get("LSYNC_OPTIONS", "{}"))
    from latentsync.pipelines import lipsync_pipeline

    plain = lipsync_pipeline.LipsyncPipeline

    class Compiled(plain):  # type: ignore[misc, valid-type]
        """Its class, which the script calls once its DeepCache flag has been seen to."""

        compiled = False

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.compiled:  # the call comes from the compiled pipeline
                return super().__call__(*args, **kwargs)
            self.compiled = True
            pipeline = torch.compile(self, backend="lsync", options=options)
            result = pipeline(*args, **kwargs)
            print(pipeline.lsync.report())
            return result

    lipsync_pipeline.LipsyncPipeline = Compiled
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
