"""What both training scripts share: a wall-clock budget, fp32 master weights, a progress line.

A run is bounded by time rather than steps, because GPUs are paid by the minute. The learning rate
therefore follows the share of the budget that is gone, counted over all calls of a run, so that a
run interrupted half-way and resumed ends where it should.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class Budget:
    """Time (or steps) that a run may take.

    minutes: wall-clock length of the whole run, over all its calls, set-up included.
    call_minutes: length of this call; the run is saved and stops when it is over.
    steps: when given, replaces ``minutes`` by a fixed number of steps (tests, reproduction).
    used: seconds spent by earlier calls.
    """

    minutes: float
    call_minutes: float | None = None
    steps: int | None = None
    used: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds of the run that are gone, earlier calls included."""
        return self.used + time.monotonic() - self.started

    def fraction(self, step: int) -> float:
        """Share of the run that is over, in [0, 1]."""
        done = step / self.steps if self.steps else self.seconds() / (60 * self.minutes)
        return min(1.0, done)

    def finished(self, step: int) -> bool:
        return self.fraction(step) >= 1.0

    def call_over(self) -> bool:
        """Whether this call has to stop although the run is not finished."""
        if self.call_minutes is None:
            return False
        return time.monotonic() - self.started >= 60 * self.call_minutes


def learning_rate(peak: float, fraction: float, *, warmup: float = 0.03) -> float:
    """Linear warm-up over the first ``warmup`` of the run, then a cosine to 1 % of the peak."""
    if fraction < warmup:
        return peak * max(fraction / warmup, 0.02)
    progress = (fraction - warmup) / (1 - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """AdamW on fp32 weights behind modules that compute in ``dtype``, with a moving average.

    The modules hold working copies in ``dtype``, so activations and kernels are all of that
    type and no autocast casts run; gradients are gathered into fp32 before the update. The
    moving average (``average``) is what gets evaluated and published.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        ema: float = 0.999,
        max_norm: float = 1.0,
    ) -> None:
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.weights = [p.detach().float().clone() for p in module.parameters()]
        self.average = [w.clone() for w in self.weights]
        self._gradients = [torch.zeros_like(w) for w in self.weights]
        for weight, gradient in zip(self.weights, self._gradients, strict=True):
            weight.grad = gradient
        module.to(dtype)
        self.live: list[Tensor] = list(module.parameters())
        self.ema, self.max_norm = ema, max_norm
        self.steps = 0
        decayed = [w for w in self.weights if w.ndim > 1]
        plain = [w for w in self.weights if w.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=betas,
            fused=self.weights[0].is_cuda,
        )

    def step(self, lr: float) -> Tensor:
        """Apply the gradients that ``backward`` left; returns their norm (on the device)."""
        arrived = [live.grad for live in self.live if live.grad is not None]
        if len(arrived) < len(self.live):
            missing = [n for n, p in zip(self.names, self.live, strict=True) if p.grad is None]
            raise RuntimeError(f"no gradient reached {missing[0]} ({len(missing)} parameters)")
        torch._foreach_copy_(self._gradients, arrived)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps += 1
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        self.publish(self.weights)
        for live in self.live:
            live.grad = None
        return norm

    @torch.no_grad()
    def publish(self, weights: list[Tensor]) -> None:
        """Write ``weights`` into the module's working copies."""
        torch._foreach_copy_(self.live, weights)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, fp32."""
        return dict(zip(self.names, self.average, strict=True))

    def state(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "weights": self.weights,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        if state["names"] != self.names:
            raise ValueError("the saved state belongs to another model: parameter names differ")
        torch._foreach_copy_(self.weights, [w.to(self.weights[0]) for w in state["weights"]])
        torch._foreach_copy_(self.average, [w.to(self.average[0]) for w in state["average"]])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.publish(self.weights)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor], steps: int) -> None:
        """Start again from published weights: the moments are lost, the position is kept."""
        for name, weight, average in zip(self.names, self.weights, self.average, strict=True):
            weight.copy_(weights[name])
            average.copy_(weights[name])
        self.steps = steps
        self.publish(self.weights)


class Log:
    """Loss curve and progress line; device values are read only when a line is due."""

    def __init__(self, stage: str, budget: Budget, every: int) -> None:
        self.stage, self.budget, self.every = stage, budget, every
        self.points: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._since = time.monotonic()

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def line(self, step: int, **extra: float) -> dict[str, float]:
        """Print and record the means since the last line; raises when the loss is not finite."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        rate = self._count / max(time.monotonic() - self._since, 1e-9)
        fraction = self.budget.fraction(step)
        seconds = self.budget.seconds()
        left = (
            (self.budget.steps - step) / rate
            if self.budget.steps
            else (60 * self.budget.minutes - seconds)
        )
        point = {"step": step, "seconds": round(seconds, 1), "steps_per_second": round(rate, 3)}
        point |= {k: round(v, 6) for k, v in (means | extra).items()}
        self.points.append(point)
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        shown = " ".join(f"{k} {v:.4f}" for k, v in (means | extra).items())
        print(
            f"{self.stage} {step:6d} {100 * fraction:5.1f}% | {shown} | {rate:.2f} steps/s "
            f"| {max(left, 0) / 60:.1f} min left | {memory:.1f} GiB",
            flush=True,
        )
        self._sums, self._count, self._since = {}, 0, time.monotonic()
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{self.stage}: {bad[0]} is not finite at step {step}")
        return point

    def reset_clock(self) -> None:
        """Leave what happened since the last line (set-up, validation) out of the rate."""
        self._since = time.monotonic()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """torch.save through a temporary name: an interrupt never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    return torch.load(path, map_location=device, weights_only=True)  # type: ignore[no-any-return]


def save_run(path: Path, trainer: Trainer, step: int, budget: Budget, log: Log) -> None:
    """Keep all that a later call needs to go on."""
    state = {
        "trainer": trainer.state(),
        "step": step,
        "seconds": budget.seconds(),
        "points": log.points,
    }
    save_state(path, state)


def load_run(path: Path, trainer: Trainer, budget: Budget, log: Log, device: torch.device) -> int:
    """Go on from what `save_run` kept; returns the number of steps done."""
    saved = load_state(path, device)
    trainer.load_state(saved["trainer"])
    budget.used, log.points = saved["seconds"], saved["points"]
    return int(saved["step"])


def save_half(path: Path, weights: dict[str, Tensor]) -> None:
    """fp16 safetensors; raises when a value does not fit fp16."""
    half = {name: w.detach().half().contiguous().cpu() for name, w in weights.items()}
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{name} does not fit fp16")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, str(path), metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def set_up(seed: int, device: str) -> tuple[torch.device, torch.dtype]:
    """Seed, and pick the compute type: bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(seed)
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return chosen, torch.bfloat16
    return chosen, torch.float32


def parameter_count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
