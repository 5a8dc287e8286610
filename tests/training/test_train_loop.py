"""The budget, the schedule, and AdamW on fp32 weights behind working copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training.loop import Budget, Log, Trainer, learning_rate, load_state, save_half, save_state


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    rates = [learning_rate(1.0, f / 1000) for f in range(1001)]
    peak = max(range(1001), key=rates.__getitem__)
    assert rates[peak] == pytest.approx(1.0, abs=1e-3)
    assert 20 <= peak <= 40
    assert rates[0] == pytest.approx(0.02)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_budget_counts_earlier_calls() -> None:
    fresh = Budget(minutes=10)
    resumed = Budget(minutes=10, used=300)
    assert resumed.fraction(0) - fresh.fraction(0) == pytest.approx(0.5, abs=0.01)
    assert Budget(minutes=10, used=601).finished(0)
    assert not Budget(minutes=10, call_minutes=1.0, used=550).call_over()
    assert Budget(minutes=10, call_minutes=0.0).call_over()


def test_budget_of_steps_ignores_the_clock() -> None:
    budget = Budget(minutes=0.0, steps=8, used=1e6)
    assert budget.fraction(4) == 0.5
    assert not budget.finished(7)
    assert budget.finished(8)


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return net, torch.randn(32, 6), torch.randn(32, 2)


def run(trainer: Trainer, net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        (net(x) - y).square().mean().backward()
        trainer.step(1e-2)


def test_trainer_is_adamw_with_decay_on_matrices_alone() -> None:
    net, x, y = problem()
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    twin.load_state_dict(net.state_dict())
    trainer = Trainer(net, dtype=torch.float32, weight_decay=0.1, max_norm=0.5)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    run(trainer, net, x, y, 5)
    for _ in range(5):
        plain.zero_grad()
        (twin(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_resumed_run_equals_one_run(tmp_path: Path) -> None:
    net, x, y = problem()
    trainer = Trainer(net, dtype=torch.float32)
    run(trainer, net, x, y, 3)
    save_state(tmp_path / "state.pt", {"trainer": trainer.state()})
    run(trainer, net, x, y, 4)

    other, _, _ = problem()
    again = Trainer(other, dtype=torch.float32)
    again.load_state(load_state(tmp_path / "state.pt", torch.device("cpu"))["trainer"])
    run(again, other, x, y, 4)
    for name, weight in trainer.averaged().items():
        torch.testing.assert_close(again.averaged()[name], weight, rtol=0, atol=0)


def test_updates_below_half_precision_are_not_lost() -> None:
    net, x, y = problem()
    net = net.to(torch.float32)
    trainer = Trainer(net, dtype=torch.bfloat16, weight_decay=0.0)
    before = [w.clone() for w in trainer.weights]
    for _ in range(3):
        (net(x.bfloat16()) - y.bfloat16()).square().mean().backward()
        trainer.step(1e-5)
    # 1e-5 is far below the spacing of bf16 near 0.3; the fp32 weights have moved all the same.
    moved = max(float((w - b).abs().max()) for w, b in zip(trainer.weights, before, strict=True))
    assert 1e-5 < moved < 1e-4


def test_a_parameter_out_of_reach_is_named() -> None:
    net, x, y = problem()
    net.extra = nn.Linear(2, 2)
    trainer = Trainer(net, dtype=torch.float32)
    (net[2](net[1](net[0](x))) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        trainer.step(1e-3)


def test_log_stops_at_nan(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("toy", Budget(1.0, steps=10), every=2)
    log.add({"loss": torch.tensor(1.0)})
    log.add({"loss": torch.tensor(3.0)})
    assert log.line(2)["loss"] == 2.0
    assert "toy" in capsys.readouterr().out
    log.add({"loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="step 3"):
        log.line(3)


def test_half_precision_overflow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="big"):
        save_half(tmp_path / "w.safetensors", {"big": torch.tensor([1e6])})
