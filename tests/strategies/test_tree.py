"""The tree along which the ranks' hosts add: all ranks are in it, and no way through it is long."""

from hypothesis import given
from hypothesis import strategies as st
from stratagem.strategies.tree import neighbours

SIZES = st.one_of(st.integers(1, 40), st.integers(1, 3000))


@given(SIZES)
def test_each_rank_is_heard_once_and_every_sum_reaches_rank_0(size: int) -> None:
    heard: dict[int, int] = {}  # rank to the rank that it tells
    for rank in range(size):
        _, below = neighbours(rank, size)
        for other in below:
            assert other not in heard
            heard[other] = rank
    assert sorted(heard) == list(range(1, size))
    assert {rank: neighbours(rank, size)[0] for rank in heard} == heard  # both ends of each branch know of it
    assert neighbours(0, size)[0] is None
    assert all(above < rank for rank, above in heard.items())  # so that every way ends at rank 0


@given(SIZES)
def test_no_way_is_longer_than_the_logarithm(size: int) -> None:
    bits = (size - 1).bit_length()
    ready = [0] * size  # the step in which a rank has the sum of all below it, one message a step and rank
    for rank in reversed(range(size)):
        for other in neighbours(rank, size)[1]:
            ready[rank] = max(ready[rank], ready[other]) + 1
    assert ready[0] == bits
    assert sum(not neighbours(rank, size)[1] for rank in range(size)) >= size // 2  # these send one and receive one
    assert max(len(neighbours(rank, size)[1]) for rank in range(size)) == bits


def test_ranks_of_one_machine_are_summed_before_machines_are() -> None:
    # Of 8 machines with 8 ranks each, the first rank of each is the only one that hears from another machine.
    for rank in range(64):
        above, _ = neighbours(rank, 64)
        assert rank % 8 == 0 or (above is not None and above // 8 == rank // 8)
