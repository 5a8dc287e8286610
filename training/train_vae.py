"""Train the VAE of lsync-mini on aligned faces.

    python -m training.train_vae --data .train --out OUT --state STATE --minutes 6

Writes ``OUT/vae/`` (fp16, calibrated to Stable Diffusion's scaling factor), ``OUT/train_vae.json``
(loss curve) and a sheet of held-out faces beside their reconstructions. ``STATE`` keeps what a
later call needs to go on; the same command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.augment import jitter_colour, jitter_geometry
from training.codec import Autoencode, calibrate, new_vae
from training.footage import load_footage
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
from training.losses import mouth_box, mouth_map, reconstruction
from training.sheet import contact_sheet
from training.sources import FacePool, Footage


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    budget = Budget(args.minutes, args.call_minutes, args.steps)
    device, dtype = set_up(args.seed, args.device)
    footage = load_footage(args.data, device, size=args.size)
    vae = new_vae(tuple(args.widths), groups=args.groups).to(device)
    vae.to(memory_format=torch.channels_last)
    model = Autoencode(vae)
    trainer = Trainer(model, dtype=dtype, weight_decay=1e-3, ema=args.ema)
    log = Log("vae", budget, args.log_every)
    state = args.state / "vae.pt"
    step = 0
    if state.exists():
        step = load_run(state, trainer, budget, log, device)
        torch.manual_seed(args.seed + step)
        print(f"vae: resumed at step {step}, {budget.used:.0f} s used", flush=True)

    pool = FacePool(footage, args.pool, seed=args.seed + step)
    weight = 1 + 2 * mouth_map(args.size, device=device)
    forward: nn.Module = model
    terms = reconstruction
    if args.compile:
        # Faster, not necessary: a compiler that fails leaves the run to eager execution.
        torch._dynamo.config.suppress_errors = True
        forward = torch.compile(model)  # type: ignore[assignment]
        terms = torch.compile(reconstruction)
    print(f"vae: {pool.describe()}, ready after {budget.seconds():.0f} s", flush=True)
    log.reset_clock()

    while not budget.finished(step) and not budget.call_over():
        if step % args.refresh_every == 0:
            pool.refresh(args.refresh)
        target = augment(pool.batch(args.batch), footage.mask)
        pixels = target.to(dtype).contiguous(memory_format=torch.channels_last)
        side = args.size // 8
        noise = torch.randn(args.batch, 4, side, side, device=device, dtype=dtype)
        output, mean, log_variance = forward(pixels, noise)
        values = terms(output, target, mean, log_variance, weight)
        values["loss"].backward()
        rate = learning_rate(args.lr, budget.fraction(step))
        norm = trainer.step(rate)
        log.add(values | {"grad": norm})
        step += 1
        if log.due(step):
            extra = held_out_psnr(trainer, vae, footage) if step % args.check_every == 0 else {}
            log.line(step, lr=rate, **extra)
            log.reset_clock()
        if step % args.save_every == 0:
            save_run(state, trainer, step, budget, log)

    save_run(state, trainer, step, budget, log)
    finish(args, trainer, vae, footage, pool, log, complete=budget.finished(step))


def augment(faces: Tensor, mask: Tensor) -> Tensor:
    """uint8 faces ``(B, 3, H, W)`` -> varied pixels in [-1, 1]; one in six with a hidden mouth.

    The pipeline also encodes faces whose lower half is masked to grey, so the encoder has to
    know them.
    """
    pixels = faces.float() / 127.5 - 1
    pixels = jitter_colour(jitter_geometry(pixels[:, None]))[:, 0]
    hidden = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 1 / 6
    return torch.where(hidden, pixels * mask, pixels)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels for pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (a.float() - b.float()).square().mean()))


@torch.no_grad()
def held_out_psnr(trainer: Trainer, vae: AutoencoderKL, footage: Footage) -> dict[str, float]:
    """PSNR of the averaged weights on real faces that training never sees: all, and the mouth."""
    trainer.publish(trainer.average)
    target = footage.held_out_faces(32).float() / 127.5 - 1
    output = reconstruct(vae, target)
    trainer.publish(trainer.weights)
    rows, columns = mouth_box(target.shape[-1])
    return {
        "psnr": psnr(output, target),
        "psnr_mouth": psnr(output[..., rows, columns], target[..., rows, columns]),
    }


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    output: Tensor = vae.decode(latents).sample.float().clamp(-1, 1)
    return output


@torch.no_grad()
def finish(
    args: argparse.Namespace,
    trainer: Trainer,
    vae: AutoencoderKL,
    footage: Footage,
    pool: FacePool,
    log: Log,
    *,
    complete: bool,
) -> None:
    """Calibrate the averaged weights and write them with the curve and a sheet."""
    trainer.publish(trainer.average)
    final = new_vae(tuple(args.widths), groups=args.groups).to(footage.device)
    averaged = {name.removeprefix("vae."): w for name, w in trainer.averaged().items()}
    final.load_state_dict(averaged)
    batches = [pool.batch(64).float() / 127.5 - 1 for _ in range(4)]
    moments = calibrate(final, batches)
    spread = torch.cat([final.encode(b).latent_dist.std.flatten() for b in batches]).median()
    folder = args.out / "vae"
    save_half(folder / "diffusion_pytorch_model.safetensors", final.state_dict())
    final.save_config(str(folder))

    target = footage.held_out_faces(8).float() / 127.5 - 1
    output = reconstruct(final, target)
    masked = target * footage.mask
    hidden = reconstruct(final, masked)
    contact_sheet(
        args.out / "vae.png",
        {"face": target, "decoded": output, "masked": masked, "masked, decoded": hidden},
    )
    rows, columns = mouth_box(args.size)
    result = {
        "complete": complete,
        "steps": trainer.steps,
        "seconds": round(log.budget.seconds(), 1),
        "batch": args.batch,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in final.parameters()),
        "held_out_psnr": round(psnr(output, target), 3),
        "held_out_psnr_mouth": round(
            psnr(output[..., rows, columns], target[..., rows, columns]), 3
        ),
        "latents_before_calibration": moments,
        "latent_noise": round(float(spread) * 0.18215, 4),
        "data": footage.describe(),
        "curve": log.points,
    }
    write_json(args.out / "train_vae.json", result)
    print({k: v for k, v in result.items() if k != "curve"}, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder made by training.prepare")
    p.add_argument("--out", type=Path, required=True, help="results: weights, curve, sheet")
    p.add_argument(
        "--state", type=Path, required=True, help="folder that keeps the resumable state"
    )
    p.add_argument(
        "--minutes", type=float, default=6.0, help="length of the run, all calls together"
    )
    p.add_argument("--call-minutes", type=float, help="stop and save after this long")
    p.add_argument("--steps", type=int, help="run this many steps instead of --minutes")
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--ema", type=float, default=0.998)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--widths", type=int, nargs=4, default=[24, 48, 96, 144])
    p.add_argument("--groups", type=int, default=8)
    p.add_argument("--pool", type=int, default=96, help="synthetic clips kept to draw faces from")
    p.add_argument("--refresh", type=int, default=8, help="synthetic clips replaced at a time")
    p.add_argument("--refresh-every", type=int, default=16, help="steps between replacements")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--check-every", type=int, default=200, help="a multiple of --log-every")
    p.add_argument("--save-every", type=int, default=500)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
