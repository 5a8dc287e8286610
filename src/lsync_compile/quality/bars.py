"""What each preset promises, and whether a result keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lsync_compile.quality.compare import Result, Study


@dataclass(frozen=True)
class Bar:
    """Least quality of a preset in the mouth region, against the unoptimised output.

    Attributes:
        psnr: dB.
        ssim: None where none is promised.
        loss_to_truth: dB by which the PSNR against the original may be below the reference's,
            where the sound is the clip's own; None where nothing is promised.
    """

    psnr: float
    ssim: float | None = None
    loss_to_truth: float | None = None


# For a trained model; see the design notes in docs/quality.md.
BARS = {
    "exact": Bar(psnr=45.0),
    "balanced": Bar(psnr=35.0, ssim=0.97, loss_to_truth=0.1),
    "turbo": Bar(psnr=30.0, ssim=0.94),
}


@dataclass(frozen=True)
class Verdict:
    """Whether a result clears a bar.

    Attributes:
        setting: name of the setting.
        preset: whose bar.
        shortfalls: what is below it, in words; empty if nothing is.
    """

    setting: str
    preset: str
    shortfalls: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is below the bar."""
        return not self.shortfalls

    def __str__(self) -> str:
        if self.passed:
            return f"{self.setting} clears the bar of {self.preset}"
        return f"{self.setting} is below the bar of {self.preset}: {'; '.join(self.shortfalls)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "setting": self.setting,
            "preset": self.preset,
            "passed": self.passed,
            "shortfalls": self.shortfalls,
        }


def judge_presets(study: Study) -> list[Verdict]:
    """A verdict on each candidate that was compiled with a preset."""
    return [
        judge_preset(result, study.reference, result.setting.options["preset"])
        for result in study.candidates
        if result.setting.options and result.setting.options.get("preset") in BARS
    ]


def judge_preset(result: Result, reference: Result, preset: str) -> Verdict:
    """Whether a result keeps what a preset promises."""
    bar, mouth = BARS[preset], result.against_reference["mouth"]
    shortfalls = []
    if mouth.psnr.value < bar.psnr:
        shortfalls.append(f"mouth PSNR {mouth.psnr.value:.2f} dB, promised {bar.psnr:g}")
    if bar.ssim is not None and mouth.ssim.value < bar.ssim:
        shortfalls.append(f"mouth SSIM {mouth.ssim.value:.4f}, promised {bar.ssim:g}")
    if bar.loss_to_truth is not None and reference.against_original:
        truth, ours = (r.against_original["mouth"].psnr.value for r in (reference, result))
        if truth - ours > bar.loss_to_truth:
            shortfalls.append(
                f"{truth - ours:.2f} dB further from the original, allowed {bar.loss_to_truth:g}"
            )
    return Verdict(result.setting.name, preset, shortfalls)
