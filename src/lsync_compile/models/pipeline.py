"""LatentSync as a diffusers pipeline that streams: clip and speech in, synced clip out.

For each chunk of 16 aligned faces the pipeline encodes the masked and the reference faces with the
VAE, denoises latents with the 3-D UNet conditioned on the sound, decodes, and pastes the mouth back
into the frames (LatentSync, arXiv:2412.09262). Chunks pass through one at a time, so memory does
not depend on the length of the clip. Argument names follow the original ``LipsyncPipeline``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lsync_compile.errors import MediaError, MemoryLimitError
from lsync_compile.media.align_batch import BatchAligner
from lsync_compile.media.audio import SoundReader
from lsync_compile.media.faces import FaceDetector, create_detector
from lsync_compile.media.mask import mouth_mask
from lsync_compile.media.sources import ClipSource, SoundSource, hear, length
from lsync_compile.media.tracking import FaceTracker
from lsync_compile.media.video import probe
from lsync_compile.media.writer import VideoWriter
from lsync_compile.models.audio import AudioEncoder
from lsync_compile.models.caches import JobCaches, wanted
from lsync_compile.models.checkpoint import (
    load_audio_encoder,
    load_unet,
    load_vae,
    resolve_checkpoint,
)
from lsync_compile.models.conditions import example_inputs, vouched_inputs
from lsync_compile.models.job import (
    SAMPLE_RATE,
    ChunkResult,
    Job,
    LipsyncOutput,
    ProgressCallback,
    StepCallback,
    check_chunk_length,
    check_compatibility_arguments,
    check_counts,
    check_numbers,
    check_resolution,
)
from lsync_compile.models.run import Run
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.runtime.batching import is_out_of_memory
from lsync_compile.runtime.context import Terms
from lsync_compile.runtime.face_cache import CachedFaceDetector
from lsync_compile.runtime.running import current_session


class LatentSyncPipeline(DiffusionPipeline):
    """Syncs the mouth of a talking clip to new speech.

    Args:
        vae: Stable Diffusion's VAE (``AutoencoderKL``, 4 latent channels).
        audio_encoder: sound to features at 50 Hz, see :class:`AudioEncoder`.
        unet: LatentSync's UNet; ``unet.config.sample_size`` sets the resolution.
        scheduler: any diffusers scheduler for a model that predicts noise.
        detector: finds the face in a frame; MTCNN by default.
        mask_path: picture of the mouth mask (black is generated); the built-in mask by default.
    """

    vae: Any
    audio_encoder: AudioEncoder
    unet: UNet3DConditionModel
    scheduler: Any

    def __init__(
        self,
        vae: Any,
        audio_encoder: Any,
        unet: Any,
        scheduler: Any,
        *,
        detector: FaceDetector | None = None,
        mask_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            audio_encoder=audio_encoder,
            unet=unet,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.detector = detector or create_detector("mtcnn")
        self.mask_path = mask_path

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        detector: str = "mtcnn",
        resolution: int | None = None,
    ) -> LatentSyncPipeline:
        """Load ``"mini"`` (bundled) or the folder of a LatentSync 1.5 or 1.6 checkpoint.

        Args:
            name_or_folder: ``"mini"`` or a folder with ``latentsync_unet.pt``, the VAE and Whisper.
            torch_dtype: of the UNet and the VAE. The audio encoder stays in float32.
            device: where the models go.
            detector: ``"mtcnn"`` or ``"insightface"`` (extra).
            resolution: side of the face in pixels, for folders in which nothing says so.

        Raises:
            CheckpointError: a file is missing or does not fit; the message names it.
        """
        checkpoint = resolve_checkpoint(name_or_folder, resolution=resolution)
        pipeline = cls(
            vae=load_vae(checkpoint, dtype=torch_dtype),
            audio_encoder=load_audio_encoder(checkpoint),
            unet=load_unet(checkpoint.unet_file, checkpoint.unet_config, dtype=torch_dtype),
            scheduler=default_scheduler(),
            detector=create_detector(detector),
            mask_path=checkpoint.mask_file,
        )
        pipeline.to(device)
        return pipeline

    @property
    def device(self) -> torch.device:
        """Where the UNet is; the inherited property asks audio encoders, which need not know."""
        device: torch.device = self.unet.device
        return device

    @property
    def resolution(self) -> int:
        """Side of the aligned face in pixels that the UNet was trained for."""
        side: int = self.unet.config.sample_size * self.vae_scale_factor
        return side

    @property
    def mask(self) -> Tensor:
        """(1, R, R) float32: 1 where the aligned face is kept, 0 where it is generated."""
        return mouth_mask(self.resolution, self.mask_path)

    def example_inputs(
        self, num_frames: int = 16, guided: bool = True
    ) -> dict[str, dict[str, Tensor]]:
        """Inputs of a chunk's calls of the networks, for :func:`lsync_compile.explain.explain`."""
        tokens = 10 * self.audio_encoder.states  # 2 * (2 + 1 + 2) positions of each state
        return example_inputs(self.vae, self.unet, frames=num_frames, tokens=tokens, guided=guided)

    def example_terms(self, guided: bool = True) -> Terms:
        """What a run says of its calls of the UNet, for :func:`lsync_compile.explain.explain`."""
        vouched = vouched_inputs(self.vae, self.unet, guided=guided)
        return Terms(vouched, chunks=True, timesteps=True)

    def __call__(
        self,
        video_path: str | Path,
        audio_path: str | Path | None = None,
        video_out_path: str | Path = "out.mp4",
        num_frames: int = 16,
        video_fps: int = 25,
        audio_sample_rate: int = SAMPLE_RATE,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        weight_dtype: torch.dtype | None = None,
        eta: float = 0.0,
        mask_image_path: str | Path | None = None,
        temp_dir: str | Path | None = None,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
        callback_steps: int = 1,
        *,
        on_missing_face: str = "pass",
        max_frames: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> LipsyncOutput:
        """Sync ``video_path`` to ``audio_path`` and write ``video_out_path``.

        The output is as long as the sound, at ``video_fps``; a shorter clip is played back and
        forth. An existing output file is replaced only by a finished one.

        Args:
            video_path: clip with one talking face; any rate, resampled to ``video_fps``.
            audio_path: speech, any container and rate; None takes the clip's own sound.
            video_out_path: file to write; its folder must exist.
            num_frames: frames a chunk.
            video_fps: frames/s of the output; the models are trained for 25.
            audio_sample_rate: must be 16000, kept for compatibility with the original.
            height, width: side of the aligned face in pixels; the UNet's own by default.
            num_inference_steps: denoising steps a chunk.
            guidance_scale: weight of classifier-free guidance; 1.0 and below switch it off.
            weight_dtype: kept for compatibility; None or the dtype of the UNet.
            eta: DDIM's eta, 0 is deterministic.
            mask_image_path: picture that replaces the pipeline's mouth mask.
            temp_dir: ignored, kept for compatibility: nothing is written but the output file.
            generator: source of all random draws; None is torch's global one.
            callback: called as ``callback(step, timestep, latents)`` every ``callback_steps``.
            on_missing_face: ``"pass"`` leaves frames without a face as they are, ``"fail"`` raises.
            max_frames: stop after this many frames.
            progress: called as ``progress(done, total)`` in denoising steps instead of the bar.

        Raises:
            OptionError, MediaError, NoFaceError, MemoryLimitError: one line each, nothing written.
        """
        begin = time.perf_counter()
        job = self._plan(
            video_path,
            audio_path,
            num_frames=num_frames,
            video_fps=video_fps,
            audio_sample_rate=audio_sample_rate,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            weight_dtype=weight_dtype,
            eta=eta,
            mask_image_path=mask_image_path,
            generator=generator,
            callback=callback,
            callback_steps=callback_steps,
            on_missing_face=on_missing_face,
            max_frames=max_frames,
            progress=progress,
        )
        info = probe(video_path)
        written = missing = 0
        with VideoWriter(
            video_out_path,
            info.width,
            info.height,
            fps=video_fps,
            audio=SoundReader(video_path if audio_path is None else audio_path),
            colour=info.colour,
            pixel_aspect=info.pixel_aspect,
        ) as writer:
            for result in self._run(job):
                with job.timeline.span("write", result.index):
                    for frame in result.frames:
                        writer.write(frame)
                written += len(result.frames)
                missing += result.has_face.count(False)
        return LipsyncOutput(
            video_path=str(video_out_path),
            num_frames=written,
            missing_faces=missing,
            seconds=time.perf_counter() - begin,
        )

    def synthesize(
        self, video_path: ClipSource, audio_path: SoundSource | None = None, **arguments: Any
    ) -> Iterator[ChunkResult]:
        """Yield finished chunks one by one and write nothing; arguments as for a call.

        Clip and sound may also be in memory: :class:`~lsync_compile.media.sources.FrameArray`,
        :class:`~lsync_compile.media.sources.SoundArray`. Arguments are checked at once, work
        starts with the first chunk that is asked for.
        """
        return self._run(self._plan(video_path, audio_path, **arguments))

    def _plan(
        self,
        video_path: ClipSource,
        audio_path: SoundSource | None,
        *,
        num_frames: int = 16,
        video_fps: int = 25,
        audio_sample_rate: int = SAMPLE_RATE,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        weight_dtype: torch.dtype | None = None,
        eta: float = 0.0,
        mask_image_path: str | Path | None = None,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
        callback_steps: int = 1,
        on_missing_face: str = "pass",
        max_frames: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> Job:
        """Check the arguments, read the sound and settle how many frames come out."""
        resolution = check_resolution(
            height or self.resolution, width or self.resolution, self.vae_scale_factor
        )
        check_counts(
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            callback_steps=callback_steps,
            video_fps=video_fps,
            max_frames=1 if max_frames is None else max_frames,
        )
        check_numbers(guidance_scale=guidance_scale, eta=eta)
        check_chunk_length(num_frames, self.unet.max_frames)
        check_compatibility_arguments(audio_sample_rate, weight_dtype, self.unet.dtype)
        sound_path = video_path if audio_path is None else audio_path
        sound = hear(sound_path, audio_sample_rate)
        count = math.ceil(len(sound) * video_fps / audio_sample_rate - 1e-6)
        if count == 0:
            raise MediaError(f"{sound_path}: the sound is empty; there is nothing to sync to")
        if audio_path is None:
            count = length(video_path, video_fps, most=count)
        if max_frames is not None:
            count = min(count, max_frames)
        mask = mouth_mask(resolution, mask_image_path or self.mask_path)
        return Job(
            video_path=video_path,
            sound=sound,
            count=count,
            fps=video_fps,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            mask=mask.to(self._execution_device),
            generator=generator,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
            tracker=self._tracker(resolution, on_missing_face),
            session=current_session(),
        )

    def _tracker(self, resolution: int, on_missing_face: str) -> FaceTracker:
        """What finds and cuts the faces of a run, with the caches that its options ask for."""
        session, device = current_session(), self._execution_device
        detector = self.detector
        if session is not None and session.options.face_cache:
            detector = CachedFaceDetector(
                detector,
                tolerance=session.options.face_tolerance,
                tracking=session.options.track_faces,
            )
        batched = wanted(session, "batch_faces", device)
        batch = BatchAligner(resolution, device) if batched else None
        return FaceTracker(detector, resolution, on_missing_face, batch)

    def _run(self, job: Job) -> Iterator[ChunkResult]:
        """Stream a planned job, one chunk after the other."""
        device = self._execution_device
        synthesizer = ChunkSynthesizer(self.vae, self.unet, self.scheduler, job, device)
        caches = JobCaches(job, self, device)
        run = Run(
            job,
            synthesizer,
            self.audio_encoder,
            device,
            encodings=caches.encodings,
            parallel=wanted(job.session, "parallel_stages", device),
        )
        total = job.chunks * job.num_inference_steps
        bar = self.progress_bar(total=total) if job.progress is None else None
        self.unet.eval()

        def advance(done: int) -> None:
            if job.progress is not None:
                job.progress(done, total)
            elif bar is not None:
                bar.update(done - bar.n)

        try:
            yield from run.results(advance)
            caches.keep()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"out of memory on {self.device} with num_frames={job.num_frames}; use a smaller "
                "num_frames, torch_dtype=torch.float16 or a smaller checkpoint"
            ) from error
        finally:
            if bar is not None:
                bar.close()
            caches.account()
