"""The memory planner against brute force, and the pool's rules on a CPU."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsync_compile.runtime.memory import (
    ALIGNMENT,
    BatchAwareMemoryPool,
    Lifetime,
    MemoryPools,
    aligned,
    plan,
    readable,
    span,
)

CPU = torch.device("cpu")
LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 12)), max_size=14
)


def buffers(lives: list[tuple[int, int, int]]) -> list[Lifetime]:
    return [
        Lifetime(str(i), size, min(begin, end), max(begin, end))
        for i, (size, begin, end) in enumerate(lives)
    ]


@settings(max_examples=200, deadline=None)
@given(LIVES)
def test_buffers_that_live_together_never_overlap(lives: list[tuple[int, int, int]]) -> None:
    found = buffers(lives)
    made = plan(found)
    for index, one in enumerate(found):
        assert made.offsets[one.name] % ALIGNMENT == 0
        for other in found[:index]:
            if one.first <= other.last and other.first <= one.last:
                begin, end = made.offsets[one.name], made.offsets[other.name]
                assert begin + aligned(one.size) <= end or end + aligned(other.size) <= begin
    moments = [
        sum(aligned(each.size) for each in found if each.first <= time <= each.last)
        for time in range(13)
    ]
    assert made.bound == max(moments)
    assert made.bound <= made.size <= made.summed
    assert made.summed == sum(aligned(each.size) for each in found)


def test_a_chain_needs_two_of_its_buffers() -> None:
    chain = [Lifetime(f"x{i}", 1000 * 512, i, i + 1) for i in range(50)]
    made = plan(chain)
    assert made.size == made.bound == 2 * 1000 * 512
    assert made.summed == 50 * 1000 * 512


def test_a_plan_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="'b' ends before"):
        plan([Lifetime("a", 1, 0, 1), Lifetime("b", 1, 2, 1)])
    with pytest.raises(ValueError, match="same name"):
        plan([Lifetime("a", 1, 0, 1), Lifetime("a", 1, 2, 3)])
    assert plan([]).size == 0


def test_leases_lie_over_each_other() -> None:
    pool = BatchAwareMemoryPool(CPU)
    long = pool.lease([4000, 100, 4000])
    short = pool.lease([2000, 100])
    assert pool.static_bytes == long.size == 2 * 4096 + 512
    like = torch.empty(1000)
    assert long.tensor(0, like).data_ptr() == short.tensor(0, torch.empty(500)).data_ptr()
    starts = [long.tensor(0, like), long.tensor(1, torch.empty(25)), long.tensor(2, like)]
    addresses = [tensor.data_ptr() for tensor in starts]
    assert len(set(addresses)) == 3
    assert all((address - addresses[0]) % ALIGNMENT == 0 for address in addresses)


def test_an_arena_grows_and_what_is_leased_stays() -> None:
    pool = BatchAwareMemoryPool(CPU)
    small = pool.lease([1024])
    first = small.tensor(0, torch.empty(256))
    first.fill_(7)
    address = first.data_ptr()
    large = pool.lease([1024, 2048])
    assert pool.static_bytes == 1024 + 2048
    large.tensor(1, torch.empty(512)).fill_(1)
    large.tensor(0, torch.empty(256)).fill_(2)
    assert first.tolist() == [2] * 256  # the smaller one lies over it
    assert first.data_ptr() == address
    del large
    assert pool.static_bytes == 1024
    assert pool.lease([512]).tensor(0, torch.empty(1)).data_ptr() == address
    del first, small
    assert pool.static_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_tensors_have_the_layout_asked_for(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    like = torch.empty(shape, dtype=dtype)
    if like.dim() > 1:
        like = like.transpose(0, 1)
    with torch.inference_mode():
        lease = BatchAwareMemoryPool(CPU).lease([10, span(like)])
        made = lease.tensor(1, like)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
    assert not made.is_inference()
    made.fill_(1)
    assert torch.equal(made, torch.ones(made.shape, dtype=dtype))


def test_span_counts_from_the_first_to_the_last_element() -> None:
    x = torch.empty(4, 6)
    assert span(x) == 4 * 24
    assert span(x[:, ::2]) == 4 * 23
    assert span(x[:1].expand(9, 6)) == 4 * 6
    assert span(x[:0]) == 0


def test_contents_are_ones_own_until_someone_else_has_a_turn() -> None:
    pool = BatchAwareMemoryPool(CPU)
    one, other = pool.lease([8]), pool.lease([8])
    turns = []
    for lease in (one, one, other, one, one):
        with pool.turn(lease) as untouched:
            turns.append(untouched)
    assert turns == [False, True, False, False, True]
    with pytest.raises(KeyError), pool.turn(one):
        raise KeyError
    with pool.turn(one) as untouched:  # it may have been half written
        assert not untouched


def test_turns_exclude_each_other() -> None:
    pool = BatchAwareMemoryPool(CPU)
    lease, inside, most = pool.lease([8]), [0], [0]

    def work() -> None:
        for _ in range(200):
            with pool.turn(lease):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_pools_are_shared_by_group_and_device() -> None:
    pools = MemoryPools()
    assert pools.get("unet", CPU) is pools.get("unet", CPU)
    assert pools.get("unet", CPU) is not pools.get("vae", CPU)
    assert pools.get("unet", CPU) is not pools.get("unet", torch.device("meta"))
    assert pools.get("unet", CPU).scratch_bytes() == 0
    assert pools.get("unet", CPU).available_bytes() is None


def test_bytes_for_people() -> None:
    sizes = [0, 1023, 1024, 1536, 5 * 2**20, 3 * 2**30, 5000 * 2**30]
    assert [readable(size) for size in sizes] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "5000.0 GiB",
    ]  # fmt: skip
