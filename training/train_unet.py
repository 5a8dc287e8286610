"""Train the UNet and the sound encoder of lsync-mini together, on latents of the trained VAE.

    python -m training.train_unet --data .train --vae OUT/vae --out OUT --state STATE --minutes 12

Writes ``OUT/unet.safetensors`` and ``OUT/audio.safetensors`` (fp16, averaged weights) with their
configurations, and ``OUT/train_unet.json`` (loss curve). ``STATE`` keeps what a later call needs
to go on; the same command resumes. Where the state is lost, ``--init OUT`` goes on from the
weights and the position that the last call wrote.

What to watch: ``val_right`` (held-out error with the right sound) has to fall below
``val_wrong`` (another chunk's sound) and ``val_none`` (null sound); until it does, the model
does not listen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.unet import UNet3DConditionModel
from training.augment import colour_mel, jitter_mel
from training.bank import Batch, LatentBank
from training.codec import encode, load_vae
from training.denoise import hear, probe, region_weights, signal_levels, training_terms
from training.footage import load_footage
from training.graphed import GraphedTerms
from training.loop import (
    Budget,
    Log,
    Trainer,
    learning_rate,
    load_run,
    save_half,
    save_run,
    set_up,
    write_json,
)
from training.sources import ClipMaker, Footage, part_of_sound

UNET_CONFIG = Path(__file__).with_name("mini_unet.json")
AUDIO_CONFIG = Path(__file__).with_name("mini_audio.json")


class Pair(nn.Module):
    """The two networks that are trained together, so that one optimiser holds both."""

    def __init__(self, unet: UNet3DConditionModel, audio: MelAudioEncoder) -> None:
        super().__init__()
        self.unet, self.audio = unet, audio


def new_pair(unet_config: dict[str, Any], audio_config: dict[str, Any]) -> Pair:
    """Untrained networks, initialised for training from scratch.

    LatentSync zeroes the last convolution and the exits of the motion modules because it starts
    from an image model. The exits get a small random start here: the audio reaches the mouth
    through the motion modules too, and ten minutes are short.
    """
    unet = UNet3DConditionModel(**unet_config)
    audio = MelAudioEncoder(**audio_config)
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and name.endswith("proj_out.weight"):
            nn.init.normal_(parameter, std=0.2 / parameter.shape[1] ** 0.5)
    nn.init.normal_(unet.conv_out.weight, std=0.02)
    return Pair(unet, audio)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    budget = Budget(args.minutes, args.call_minutes, args.steps)
    device, dtype = set_up(args.seed, args.device)
    torch.backends.cudnn.benchmark = args.autotune and device.type == "cuda"
    footage = load_footage(args.data, device, size=args.size)
    vae = load_vae(args.vae, device, dtype)
    unet_config = json.loads(args.unet_config.read_text())
    audio_config = json.loads(args.audio_config.read_text())
    pair = new_pair(unet_config, audio_config).to(device)
    # Spectra need fp32; the pair computes in `dtype`.
    ears = MelAudioEncoder(**audio_config).to(device)
    trainer = Trainer(pair, dtype=dtype, weight_decay=args.weight_decay, ema=args.ema)
    log = Log("unet", budget, args.log_every)
    state = args.state / "unet.pt"
    step = resume(args, state, trainer, budget, log, device)

    maker = ClipMaker(footage, seed=args.seed + step)
    bank = LatentBank(
        maker, vae, slots=tuple(args.slots), shares=tuple(args.shares), length=args.length
    )
    bank.fill()
    levels = signal_levels(default_scheduler(), device)
    side = args.size // 8
    mask = F.interpolate(footage.mask[None], size=(side, side))[0]
    region = region_weights(footage.mask, side)
    held_out = held_out_batch(footage, vae)
    print(f"unet: {bank.describe()}, ready after {budget.seconds():.0f} s", flush=True)
    log.reset_clock()

    def terms(mel: Tensor, *latents: Tensor) -> dict[str, Tensor]:
        return training_terms(
            pair.unet,
            hear(pair.audio, mel, latents[0].shape[2]),
            Batch(*latents, mel),
            levels,
            mask,
            region,
            drop_sound=args.drop_sound,
            dtype=dtype,
        )

    graphed = GraphedTerms(terms, trainer.live, record=args.graphs)
    lengths = torch.Generator().manual_seed(args.seed + step)
    while not budget.finished(step) and not budget.call_over():
        if step and step % args.refresh_every == 0:
            bank.refresh(args.refresh)
        batch = bank.batch(args.batch, chunk_length(args.frames, lengths, short=args.short))
        mel = colour_mel(jitter_mel(ears.mel(batch.sound))).to(dtype)
        values = graphed(mel, batch.target, batch.masked, batch.reference)
        rate = learning_rate(args.lr, budget.fraction(step))
        norm = trainer.step(rate)
        log.add(values | {"grad": norm})
        step += 1
        if log.due(step):
            extra = {}
            if step % args.check_every == 0:
                extra = check(pair, ears.mel(held_out.sound), held_out, levels, mask, region, dtype)
            log.line(step, lr=rate, **extra)
            log.reset_clock()
        if step % args.save_every == 0:
            save_run(state, trainer, step, budget, log)

    save_run(state, trainer, step, budget, log)
    finish(args, trainer, pair, footage, bank, log, complete=budget.finished(step))


def chunk_length(frames: int, generator: torch.Generator, *, short: float = 1 / 8) -> int:
    """Frames of the chunks of one step.

    A share ``short`` of the steps has shorter chunks, as the last chunk of a clip has; of two
    lengths only, because each new shape costs ten seconds of choosing kernels on a GPU.
    """
    draw, length = torch.rand(2, generator=generator).tolist()
    if draw < short:
        return max(1, frames // (5 if length < 0.5 else 2))
    return frames


def resume(
    args: argparse.Namespace,
    state: Path,
    trainer: Trainer,
    budget: Budget,
    log: Log,
    device: torch.device,
) -> int:
    """Load what an earlier call left; returns the number of steps done."""
    if state.exists():
        step = load_run(state, trainer, budget, log, device)
    elif args.init is not None:
        position = json.loads((args.init / "train_unet.json").read_text())
        step, budget.used, log.points = (position[k] for k in ("steps", "seconds", "curve"))
        trainer.load_weights(read_weights(args.init, device, "unet", "audio"), step)
    elif args.start is not None or args.ears is not None:
        weights = dict(trainer.averaged())
        if args.start is not None:
            weights |= read_weights(args.start, device, "unet")
        weights |= read_weights(args.ears or args.start, device, "audio")
        trainer.load_weights(weights, 0)
        return 0
    else:
        return 0
    torch.manual_seed(args.seed + step)
    print(f"unet: resumed at step {step}, {budget.used:.0f} s used", flush=True)
    return int(step)


def read_weights(folder: Path, device: torch.device, *parts: str) -> dict[str, Tensor]:
    """Published weights of the networks, by the names that `Pair` gives them."""
    return {
        f"{part}.{name}": weight.to(device)
        for part in parts
        for name, weight in load_file(str(folder / f"{part}.safetensors")).items()
    }


@torch.no_grad()
def held_out_batch(footage: Footage, vae: Any, frames: int = 16) -> Batch:
    """All whole chunks of the held-out ends of the real recordings, each with the reference
    half of that end away."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for take in footage.of("real"):
        if len(take.frames) - take.train < frames:
            continue
        pixels = take.frames[take.train :].float() / 127.5 - 1
        sound = take.sound[take.train * 640 :]
        target, masked = encode(vae, pixels), encode(vae, pixels * footage.mask)
        reference = target.roll(len(target) // 2, 0)
        for start in range(0, len(pixels) - frames + 1, frames):
            here = slice(start, start + frames)
            heard = part_of_sound(sound, start, frames)
            parts.append((target[here], masked[here], reference[here], heard))
    target, masked, reference, heard = (torch.stack(column) for column in zip(*parts, strict=True))
    video = [x.transpose(1, 2).float() for x in (target, masked, reference)]
    return Batch(video[0], video[1], video[2], heard)


@torch.no_grad()
def check(
    pair: Pair,
    mel: Tensor,
    held_out: Batch,
    levels: Tensor,
    mask: Tensor,
    region: Tensor,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Held-out error with the right, a wrong and no sound; of the weights as they are."""
    windows = hear(pair.audio, mel.to(dtype), held_out.target.shape[2])
    errors = probe(pair.unet, windows, held_out, levels, mask, region, seed=3, dtype=dtype)
    return {f"val_{name}": value for name, value in errors.items()}


@torch.no_grad()
def finish(
    args: argparse.Namespace,
    trainer: Trainer,
    pair: Pair,
    footage: Footage,
    bank: LatentBank,
    log: Log,
    *,
    complete: bool,
) -> None:
    """Write the averaged weights of both networks, and the curve."""
    averaged = trainer.averaged()
    for part in ("unet", "audio"):
        weights = {
            name.removeprefix(f"{part}."): weight
            for name, weight in averaged.items()
            if name.startswith(f"{part}.")
        }
        # Buffers (position tables, mel filters) belong to the file as well.
        module = getattr(pair, part)
        weights |= {k: v for k, v in module.state_dict().items() if k not in weights}
        save_half(args.out / f"{part}.safetensors", weights)
    (args.out / "unet.json").write_text(args.unet_config.read_text())
    (args.out / "audio.json").write_text(args.audio_config.read_text())
    result = {
        "complete": complete,
        "steps": trainer.steps,
        "seconds": round(log.budget.seconds(), 1),
        "batch": args.batch,
        "frames": args.frames,
        "seed": args.seed,
        "clips_made": bank.made,
        "parameters": {
            part: sum(p.numel() for p in getattr(pair, part).parameters())
            for part in ("unet", "audio")
        },
        "data": footage.describe(),
        "curve": log.points,
    }
    if args.start is not None:
        result["earlier"] = json.loads((args.start / "train_unet.json").read_text())
    write_json(args.out / "train_unet.json", result)
    print({k: v for k, v in result.items() if k not in ("curve", "earlier")}, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder made by training.prepare")
    p.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    p.add_argument("--out", type=Path, required=True, help="results: weights, configs, curve")
    p.add_argument(
        "--state", type=Path, required=True, help="folder that keeps the resumable state"
    )
    p.add_argument("--init", type=Path, help="an earlier --out to go on from without its state")
    p.add_argument("--start", type=Path, help="weights of an earlier --out to begin a new run with")
    p.add_argument("--ears", type=Path, help="a sound encoder of training.train_ears to begin with")
    p.add_argument("--unet-config", type=Path, default=UNET_CONFIG)
    p.add_argument("--audio-config", type=Path, default=AUDIO_CONFIG)
    p.add_argument(
        "--minutes", type=float, default=12.0, help="length of the run, all calls together"
    )
    p.add_argument("--call-minutes", type=float, help="stop and save after this long")
    p.add_argument("--steps", type=int, help="run this many steps instead of --minutes")
    p.add_argument("--batch", type=int, default=56, help="chunks a step")
    p.add_argument("--frames", type=int, default=16, help="frames of a chunk")
    p.add_argument("--lr", type=float, default=8e-4)
    p.add_argument("--weight-decay", type=float, default=0.02)
    p.add_argument("--ema", type=float, default=0.998)
    p.add_argument("--drop-sound", type=float, default=0.12, help="share of chunks with null sound")
    p.add_argument("--size", type=int, default=256)
    p.add_argument(
        "--slots",
        type=int,
        nargs=3,
        default=[192, 64, 160],
        help="clips in the bank: real, portrait, synthetic",
    )
    p.add_argument("--shares", type=float, nargs=3, default=[0.45, 0.12, 0.43])
    p.add_argument("--length", type=int, default=64, help="frames of a clip in the bank")
    p.add_argument("--refresh", type=int, default=8, help="clips replaced at a time")
    p.add_argument("--refresh-every", type=int, default=20, help="steps between replacements")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--check-every", type=int, default=200, help="a multiple of --log-every")
    p.add_argument("--save-every", type=int, default=500)
    p.add_argument("--short", type=float, default=1 / 8, help="share of steps with short chunks")
    p.add_argument(
        "--autotune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let cuDNN time its kernels: faster after the first minute",
    )
    p.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replay steps as CUDA graphs (on a GPU)",
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
