"""Which steps of the sound a video frame sees."""

from __future__ import annotations

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.models.audio import AudioEncoder, audio_windows, check_samples
from lsync_compile.models.mel_encoder import MelAudioEncoder


def numbered(steps: int) -> torch.Tensor:
    """Features (steps, 5, 384) whose every value is ``10 * step + state``."""
    values = 10 * torch.arange(steps)[:, None] + torch.arange(5)
    return values[..., None].expand(-1, -1, 384).float()


def steps_seen(windows: torch.Tensor) -> list[list[int]]:
    return [(row.view(-1, 5)[:, 0] // 10).int().tolist() for row in windows[:, :, 0]]


def test_a_frame_sees_two_frames_to_either_side() -> None:
    windows = audio_windows(numbered(100), 10, 2)
    assert windows.shape == (2, 50, 384)
    assert steps_seen(windows) == [list(range(16, 26)), list(range(18, 28))]
    assert windows[0, :7, 0].tolist() == [160, 161, 162, 163, 164, 170, 171]


def test_ends_are_repeated() -> None:
    first, last = steps_seen(audio_windows(numbered(40), 0, 1)) + steps_seen(
        audio_windows(numbered(40), 19, 1)
    )
    assert first == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert last == [34, 35, 36, 37, 38, 39, 39, 39, 39, 39]
    assert steps_seen(audio_windows(numbered(40), 500, 1)) == [[39] * 10]


@pytest.mark.parametrize(
    ("fps", "centres"), [(25, [0, 2, 4, 6]), (30, [0, 1, 3, 5]), (50, [0, 1, 2, 3])]
)
def test_frame_rates_round_down(fps: float, centres: list[int]) -> None:
    windows = steps_seen(audio_windows(numbered(60), 0, 4, fps=fps))
    assert [row[4] for row in windows] == centres


def test_context_sets_the_number_of_tokens() -> None:
    windows = audio_windows(numbered(100), 10, 1, context=(1, 3))
    assert steps_seen(windows) == [list(range(18, 28))]
    assert audio_windows(numbered(100), 10, 1, context=(0, 0)).shape == (1, 10, 384)


def test_a_chunk_reads_only_the_steps_it_sees() -> None:
    table = numbered(1000)
    reads = []

    class Features:
        def __len__(self) -> int:
            return len(table)

        def read(self, start: int, stop: int) -> torch.Tensor:
            reads.append((start, stop))
            return table[start:stop]

    assert torch.equal(audio_windows(Features(), 100, 16), audio_windows(table, 100, 16))
    assert reads == [(196, 236)]


@pytest.mark.parametrize(("steps", "start", "count"), [(0, 0, 1), (10, -1, 1), (10, 0, 0)])
def test_nothing_to_see_is_an_error(steps: int, start: int, count: int) -> None:
    with pytest.raises(OptionError, match="audio_windows"):
        audio_windows(numbered(steps), start, count)


@pytest.mark.parametrize(
    "samples", [torch.zeros(0), torch.zeros(2, 100), torch.zeros(100, dtype=torch.int16)]
)
def test_what_is_no_sound_is_an_error(samples: torch.Tensor) -> None:
    with pytest.raises(OptionError, match="samples"):
        check_samples(samples)


def test_samples_are_padded_to_whole_steps() -> None:
    assert check_samples(torch.ones(1)).shape == (320,)
    assert check_samples(torch.ones(640)).shape == (640,)
    assert check_samples(torch.ones(641, dtype=torch.float64)).dtype == torch.float32


def test_encoders_keep_the_protocol() -> None:
    assert isinstance(MelAudioEncoder(), AudioEncoder)
