"""One chunk through the networks: encode, denoise, decode. Knows tensors, no files and no frames.

A chunk of f aligned faces is generated from noise under three conditions (LatentSync,
arXiv:2412.09262): the faces with the mouth masked out, the same faces unmasked as a reference for
the person's looks, and the sound of each frame.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from lsync_compile.models.conditions import Conditions, Prepared, redrawn
from lsync_compile.models.shared_calls import shared_calls
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.options import Options
from lsync_compile.runtime.batching import Lane, Predict, SmartBatcher, chunk_bytes
from lsync_compile.runtime.guard import QualityGuard
from lsync_compile.runtime.multiscale import MultiScaleProcessor
from lsync_compile.runtime.pace import Pace
from lsync_compile.runtime.running import other_options, plain_networks
from lsync_compile.runtime.speculation import SpeculativeProcessor
from lsync_compile.runtime.timesteps import can_jump
from lsync_compile.runtime.transfers import event_now, uploaded

if TYPE_CHECKING:  # it brings the libraries for video files along
    from lsync_compile.models.job import Job


class ChunkSynthesizer:
    """Generates the faces of a run's chunks, one chunk a call.

    A call is three steps, which a runtime may also take one by one: :meth:`prepare` and
    :meth:`decode` depend on their arguments alone, so they may run ahead or behind in other
    threads; :meth:`denoise` draws all random numbers and is called for the chunks in their order.

    Made anew for each run and given its networks then; kept from chunk to chunk are only the noise
    that all frames of a run share and, with the options for that, what :class:`.Pace` keeps.

    Args:
        vae, unet, scheduler: the pipeline's.
        job: the run's arguments; its generator gives the random numbers.
        device: where the networks are.

    Attributes:
        dtype: of the networks.
        joint_encoding: whether the masked and the reference faces go through the VAE's encoder in
            one call, which fills a GPU better. A CPU takes longer for one call of twice the size,
            and its convolutions may round differently in another batch size.
    """

    def __init__(
        self,
        vae: Any,
        unet: UNet3DConditionModel,
        scheduler: Any,
        job: Job,
        device: torch.device,
    ) -> None:
        self.vae = vae
        self.unet = unet
        self.dtype: torch.dtype = unet.dtype  # diffusers walks through all modules for it
        self._given_scheduler = scheduler
        self.job = job
        self.guard = None if job.session is None else QualityGuard(job.session)
        self._level = 0
        self._set_pace()
        self.device = device
        self.run = object()  # unequal to every other run's
        self.joint_encoding = device.type != "cpu"
        self.noise = self._initial_noise()
        self._scales: dict[int, MultiScaleProcessor] = {}
        self.batcher = SmartBatcher(job.session, self._chunk_bytes(), device, self._obstacle())

    @torch.no_grad()
    def __call__(
        self, chunk: int, faces: Tensor, audio: Tensor, advance: Callable[[int], None]
    ) -> Tensor:
        """Generate the faces of a chunk.

        Args:
            chunk: its number in the run, from 0.
            faces: (f, 3, R, R) uint8, aligned faces of the clip.
            audio: (f, S, D) float32, the sound of each frame.
            advance: called with the number of finished steps after each.

        Returns:
            (f, 3, R, R) in [-1, 1], the UNet's dtype: the mouth generated, the rest as in faces.
        """
        prepared = self.prepare(faces)
        return self.decode(self.denoise(chunk, prepared, audio, advance), prepared.pixels, chunk)

    @torch.no_grad()
    def prepare(self, faces: Tensor) -> Prepared:
        """Encode faces (f, 3, R, R) uint8, masked and as they are."""
        pixels, crops = self.pixels(faces), self.crops(None)
        seen = event_now(self.device)
        with self._at_level(None, pixels) if crops else nullcontext():
            moments = self._moments(self._pictures(pixels), crops)
        return Prepared(pixels, moments, crops, seen)

    def crops(self, chunk: int | None) -> bool:
        """Whether masked faces are encoded in part; None is what the run began with."""
        options = self._options(chunk)
        return options is not None and options.crop_encode

    def _pictures(self, pixels: Tensor) -> list[Tensor]:
        """What is encoded of faces (f, 3, R, R) in [-1, 1]: masked, and as they are."""
        return [(pixels * self.job.mask).to(self.dtype), pixels.to(self.dtype)]

    def pixels(self, faces: Tensor) -> Tensor:
        """Faces (f, 3, R, R) uint8 as the networks see them, in [-1, 1] on the device."""
        return (uploaded(faces, self.device).float() / 255.0 - 0.5) / 0.5

    def denoise(
        self, chunk: int, prepared: Prepared, audio: Tensor, advance: Callable[[int], None]
    ) -> Tensor:
        """Clean latents (1, 4, f, h, w) of a chunk; arguments as for a call."""
        return self.denoise_together([(chunk, prepared, audio)], advance)[0]

    @torch.no_grad()
    def denoise_together(
        self,
        chunks: Sequence[tuple[int, Prepared, Tensor]],
        advance: Callable[[int], None],
    ) -> list[Tensor]:
        """Clean latents (1, 4, f, h, w) of each of the next chunks of the run.

        Those that may share calls of the UNet do, see :class:`.SmartBatcher`.

        Args:
            chunks: number, faces and sound of each, as for a call.
            advance: called with the number of finished steps of all of them after each.
        """
        finished: list[Tensor] = []
        pending: list[Lane] = []
        announced = self.job.num_inference_steps
        alone = len(chunks) == 1 or self.batcher.limit == 1

        def finish() -> None:
            done = len(finished) * announced
            finished.extend(self._finish(pending, lambda steps: advance(done + steps)))
            pending.clear()

        try:
            for chunk in chunks:
                if pending and (alone or self._next_waits_for(pending[-1])):
                    finish()
                elif pending:
                    self.pace.assume(pending[-1].walk)
                pending.append(self._begin(*chunk, alone=alone))
            finish()
        except BaseException:
            self.pace.reset()  # what was assumed did not come
            raise
        return finished

    def _begin(self, chunk: int, prepared: Prepared, audio: Tensor, *, alone: bool) -> Lane:
        """Draw a chunk's random numbers and settle its steps."""
        if prepared.cropped and not self.crops(chunk):  # encoded before the guard fell back
            with other_options(self._options(chunk)):
                moments = self._moments(self._pictures(prepared.pixels))
            prepared = Prepared(prepared.pixels, moments, seen=prepared.seen)
        conditions = self._condition(prepared, audio)
        draws = self._copied_generator(chunk)
        if self.guard is not None and self.guard.level(chunk) != self._level:
            self._level = self.guard.level(chunk)
            self._set_pace()
        if self.speculator is not None:
            self.speculator.look(chunk, prepared)
        # Several chunks under way must not see each other's steps.
        scheduler = self.scheduler if alone else copy.deepcopy(self.scheduler)
        arguments = self._scheduler_arguments()
        clip = conditions.fixed[:1, -4:]
        walk = self.pace.begin(chunk, prepared, clip, self.noise, scheduler, arguments)
        return Lane(walk, conditions, scheduler, prepared, draws)

    def _next_waits_for(self, lane: Lane) -> bool:
        """Whether the chunk after a lane's cannot be begun before it is finished."""
        due = self.guard is not None and self.guard.due(lane.walk.chunk)
        return due or self.pace.needs_result(lane.walk)

    def _finish(self, lanes: Sequence[Lane], advance: Callable[[int], None]) -> list[Tensor]:
        """Denoise lanes that were begun, and let those learn from them who want to."""
        done = told = 0

        def tell(steps: int) -> None:
            nonlocal told
            told = max(told, done + steps)  # a batch that did not fit is begun anew
            advance(told)

        def denoise(together: Sequence[Lane]) -> list[Tensor]:
            nonlocal done
            if self.speculator is not None and self.speculator.worth(together):
                found = self.speculator.run(together, self._shared_calls, tell)
            else:
                found = self._denoise(together, tell)
            done += len(found) * self.job.num_inference_steps
            return found

        with self._at_level(lanes[0].walk.chunk, lanes[0].prepared.pixels):
            results = self.batcher.run(lanes, denoise)
        for lane, latents in zip(lanes, results, strict=True):
            chunk, prepared = lane.walk.chunk, lane.prepared
            self.pace.finish(lane.walk, latents)
            if self.guard is not None and self.guard.due(chunk):
                ours = self.decode(latents, prepared.pixels, chunk)
                exact = self._exact(chunk, prepared, lane.conditions, lane.draws)
                self.guard.judge(chunk, ours, exact, self.job.mask)
        return results

    def account(self) -> None:
        """At the end of the run: say in the report what did nothing."""
        self.batcher.account()
        if self.speculator is not None:
            self.speculator.account()
        session = self.job.session
        if session is not None and session.options.guided_steps and not self.job.guided:
            session.note("guided_steps does nothing: the run has no guidance")

    def _chunk_bytes(self) -> int:
        """Device memory that a full chunk needs in a call of the UNet."""
        config, side = self.unet.config, self.noise.shape[-1]
        positions = (2 if self.job.guided else 1) * self.job.num_frames * side * side
        return chunk_bytes(config.block_out_channels[0], positions, self.dtype.itemsize)

    def _obstacle(self) -> str:
        """Why chunks of this run cannot share calls, else nothing."""
        if not can_jump(self.scheduler, self.job.eta):
            return f"{type(self.scheduler).__name__} with eta={self.job.eta:g} may draw noise"
        return "a callback wants each chunk's steps in their order" if self.job.callback else ""

    def _set_pace(self) -> None:
        """Take the steps and the solver of the level in force, knowing nothing of chunks before."""
        job, options = self.job, None
        if self.guard is not None:
            options = self.guard.levels[self._level].options
        self.pace = Pace(job.num_inference_steps, options, job.session, eta=job.eta)
        self.speculator: SpeculativeProcessor | None = None
        if options is not None and options.speculate and job.session is not None:
            self.speculator = SpeculativeProcessor(options, job.session)
        self.scheduler = self.pace.solver(self._given_scheduler)

    @contextmanager
    def _at_level(self, chunk: int | None, pixels: Tensor) -> Iterator[None]:
        """Run the networks as a chunk's level says, and tell them of the mouth."""
        level = self._level_of(chunk)
        options = self._options(chunk)
        with other_options(options if level else None):
            if level not in self._scales:
                job = self.job
                scales = MultiScaleProcessor(job.mask, self.noise.shape[-1], job.session)
                self._scales[level] = scales
            with self._scales[level].telling(pixels):
                yield

    def _level_of(self, chunk: int | None) -> int:
        """The guard's level of a chunk; None is the one that the run began with."""
        return 0 if self.guard is None or chunk is None else self.guard.level(chunk)

    def _options(self, chunk: int | None) -> Options | None:
        """In force for a chunk; None without a compiled pipeline."""
        return None if self.guard is None else self.guard.levels[self._level_of(chunk)].options

    def _exact(self, chunk: int, prepared: Prepared, conditions: Conditions, draws: Any) -> Tensor:
        """The faces of a chunk by the plain networks in all steps, from the same noise."""
        job, given = self.job, self._given_scheduler
        pace, clip = Pace(job.num_inference_steps, eta=job.eta), conditions.fixed[:1, -4:]
        arguments = self._scheduler_arguments(given)
        if "generator" in arguments:
            arguments["generator"] = draws
        walk = pace.begin(chunk, prepared, clip, self.noise, given, arguments)
        with plain_networks():
            if prepared.cropped:
                (whole, _), vae = self._moments(self._pictures(prepared.pixels)), self.vae.config
                parts = prepared.moments[0], whole
                conditions = redrawn(conditions, *parts, vae.scaling_factor, vae.shift_factor or 0)
            lane = Lane(walk, conditions, given, prepared)
            latents = self._denoise([lane], None)[0]
            return self.decode(latents, prepared.pixels, chunk)

    def _copied_generator(self, chunk: int) -> torch.Generator | None:
        """Gives an exact chunk the draws of the approximate one, without taking any away."""
        generator = self.job.generator
        if self.guard is None or not self.guard.due(chunk):
            return generator
        if generator is None:
            generator = torch.Generator(self.device)
            return generator.manual_seed(torch.initial_seed())
        return generator.clone_state()

    def _initial_noise(self) -> Tensor:
        """(1, 4, 1, h, w): one frame of noise shared by all frames of the run."""
        generator = self.job.generator
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.job.mask.shape[-1] // factor
        return torch.randn(
            (1, self.vae.config.latent_channels, 1, side, side),
            generator=generator,
            device=self.device if generator is None else generator.device,
            dtype=torch.float32,  # torch 2.11 draws other numbers in half precision on a CPU
        ).to(self.device, self.dtype)

    def _condition(self, prepared: Prepared, audio: Tensor) -> Conditions:
        """What a chunk is conditioned on, with the sound of each frame, audio (f, S, D)."""
        job, dtype = self.job, self.dtype
        masked_latents, reference_latents = self._draw(prepared.moments)
        frames, side = len(prepared.pixels), masked_latents.shape[-1]
        small_mask = torch.nn.functional.interpolate(job.mask[None], size=(side, side))
        small_mask = small_mask.unsqueeze(2).expand(1, 1, frames, side, side)
        fixed = torch.cat([small_mask.to(dtype), masked_latents, reference_latents], dim=1)
        audio = uploaded(audio, self.device).to(dtype)
        if job.guided:
            fixed = torch.cat([fixed, fixed])
            audio = torch.cat([torch.zeros_like(audio), audio])
        has_audio = self.unet.config.add_audio_layer
        return Conditions(audio if has_audio else None, fixed)

    def _moments(self, pictures: list[Tensor], joint: bool = False) -> list[Tensor]:
        """Each (f, 3, R, R) in [-1, 1] to the parameters (f, 8, h, w) of its posterior."""
        if joint or self.joint_encoding:
            moments: Tensor = self.vae.encode(torch.cat(pictures)).latent_dist.parameters
            return list(moments.chunk(len(pictures)))
        return [self.vae.encode(pixels).latent_dist.parameters for pixels in pictures]

    def _draw(self, moments: list[Tensor]) -> list[Tensor]:
        """Scaled latents (1, 4, f, h, w) from each posterior."""
        # One draw a picture set, in order and in float32: the numbers are part of the result.
        draws: list[Tensor] = [
            DiagonalGaussianDistribution(each.float()).sample(self.job.generator).to(each.dtype)
            for each in moments
        ]
        shift = self.vae.config.shift_factor or 0.0
        factor = self.vae.config.scaling_factor
        return [((draw - shift) * factor).transpose(0, 1).unsqueeze(0) for draw in draws]

    def _denoise(
        self, lanes: Sequence[Lane], advance: Callable[[int], None] | None
    ) -> list[Tensor]:
        """From where walks of the same steps begin to clean latents (1, 4, f, h, w) of each.

        Args:
            lanes: share the calls.
            advance: told how many of all lanes' announced steps are done; nobody is without.
        """
        job, walk = self.job, lanes[0].walk
        count, predict = len(walk.timesteps), self._shared_calls(lanes)
        latents = [lane.walk.latents for lane in lanes]
        for step, timestep in enumerate(walk.timesteps):
            noises = predict(step, latents)
            latents = [
                lane.walk.step(step, noise, each)
                for lane, noise, each in zip(lanes, noises, latents, strict=True)
            ]
            if advance is None:
                continue
            # Of the steps that were announced, whatever number it took.
            advance(len(lanes) * ((step + 1) * job.num_inference_steps // count))
            if job.callback is not None and step % job.callback_steps == 0:
                for each in latents:
                    job.callback(step, timestep, each)
        return latents

    def _shared_calls(self, lanes: Sequence[Lane]) -> Predict:
        return shared_calls(self.vae, self.unet, self.job, self.run, lanes)

    def _scheduler_arguments(self, scheduler: Any = None) -> dict[str, object]:
        """The arguments of ``scheduler.step`` that not every scheduler takes."""
        offered: dict[str, object] = {"eta": self.job.eta, "generator": self.job.generator}
        accepted = inspect.signature((scheduler or self.scheduler).step).parameters
        return {name: value for name, value in offered.items() if name in accepted}

    @torch.no_grad()
    def decode(self, latents: Tensor, pixels: Tensor, chunk: int | None = None) -> Tensor:
        """Latents (1, 4, f, h, w) to faces (f, 3, R, R) in [-1, 1], surroundings pasted back.

        With its number, a chunk is decoded at the level at which it was denoised.
        """
        mask = self.job.mask
        shift = self.vae.config.shift_factor or 0.0
        flat = (latents / self.vae.config.scaling_factor + shift)[0].transpose(0, 1)
        with self._at_level(chunk, pixels):
            decoded: Tensor = self.vae.decode(flat).sample
        return decoded * (1 - mask).to(decoded.dtype) + (pixels * mask).to(decoded.dtype)
