"""A process's place among ranks, from written environments; and SLURM's lists against names written out by hand."""

import os
import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stratagem.strategies.environment import Place, find_place, warn_of_missing_srun
from stratagem.strategies.node_list import expand_nodes, expand_tasks

ALLOCATION = {  # what the shell of `salloc --nodes=2 --ntasks-per-node=2` has, and every step inherits
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "interactive",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def step(
    rank: int = 0, tasks: int = 4, by_node: str = "2(x2)", nodes: str = "gpu[07-08]", **more: str
) -> dict[str, str]:
    """What srun adds to it, for the task `rank` of equally filled nodes."""
    each = int(by_node[0])
    return {
        **ALLOCATION,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": by_node,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % each),
        "SLURM_NODEID": str(rank // each),
        **more,
    }


def facts(place: Place) -> tuple[Any, ...]:
    return place.started_by, place.rank, place.world_size, place.local_rank, place.local_world_size, place.address


def test_alone() -> None:
    assert facts(find_place({})) == ("alone", 0, 1, 0, 1, "127.0.0.1")


def test_torchruns_variables() -> None:
    written = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    place = find_place({**written, "MASTER_PORT": "1234", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert facts(place) == ("torchrun", 5, 8, 1, 4, "a")
    assert (place.port, place.attempt, place.launcher_keeps_store) == (1234, 2, False)


def test_torchrun_inside_slurm_wins() -> None:
    written = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_place(step(0, 1, "1", "gpu07") | written).started_by == "torchrun"


@pytest.mark.parametrize("rank", range(4))
def test_sruns_variables(rank: int) -> None:
    place = find_place(step(rank))
    assert facts(place) == ("SLURM", rank, 4, (0, 1, 0, 1)[rank], 2, "gpu07")
    assert place.ranks_by_node == (2, 2)


def test_srun_on_fewer_tasks_than_the_allocation_has() -> None:
    # SLURM_NTASKS, SLURM_TASKS_PER_NODE and SLURM_JOB_NODELIST may still be the allocation's.
    assert facts(find_place(step(1, 2, "1(x2)"))) == ("SLURM", 1, 2, 0, 1, "gpu07")
    assert facts(find_place(step(1, 2, "2", "gpu08"))) == ("SLURM", 1, 2, 1, 2, "127.0.0.1")


def test_nodes_with_different_numbers_of_tasks() -> None:
    # --distribution=block on 2, 2, 2, 1: task 6 is the only one of the last node.
    last = step(6, 7, "2(x3),1", "n[1-4]", SLURM_LOCALID="0", SLURM_NODEID="3")
    assert facts(find_place(last)) == ("SLURM", 6, 7, 0, 1, "n1")
    assert find_place(last).ranks_by_node == (2, 2, 2, 1)


def test_a_slurm_without_the_tasks_of_its_steps() -> None:
    written = {name: value for name, value in step(2).items() if not name.startswith("SLURM_STEP_N")}
    del written["SLURM_STEP_TASKS_PER_NODE"], written["SLURM_TASKS_PER_NODE"]
    assert facts(find_place(written)) == ("SLURM", 2, 4, 0, 2, "gpu07")
    written["SLURM_NTASKS"] = "3"
    with pytest.raises(ValueError, match="3 tasks on 2 nodes are not 2 on each"):
        find_place(written)


def test_the_port_is_the_steps_own() -> None:
    ports = {find_place(step(SLURM_JOB_ID=job, SLURM_STEP_ID=s)).port for job in ("41", "42", "43") for s in ("0", "1")}
    assert len(ports) == 6 and all(1024 < port < 32768 for port in ports)
    assert find_place(step(0)).port == find_place(step(3)).port
    assert find_place(step(MASTER_PORT="777")).port == 777


def test_an_address_of_the_users_own() -> None:
    assert find_place(step(2, MASTER_ADDR="10.0.0.7")).address == "10.0.0.7"


@pytest.mark.parametrize(
    "more",
    [
        {},  # salloc's shell on the login node
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "1"},  # salloc's shell on a node
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},  # the batch script's step
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "1"},  # --pty bash
    ],
)
def test_no_task_of_srun(more: dict[str, str]) -> None:
    assert facts(find_place({**ALLOCATION, **more})) == ("alone", 0, 1, 0, 1, "127.0.0.1")


def test_a_task_in_an_interactive_shell_is_one() -> None:
    # The shell's variables are inherited; job names mean nothing.
    assert find_place(step(1, SLURM_PTY_PORT="1", SLURM_JOB_NAME="bash")).rank == 1
    own = {"SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(os.getpid())}
    assert find_place(step(0, 1, "1", "gpu07", **own)).started_by == "SLURM"


def open_mpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    names = "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"
    numbers = rank, size, local_rank, local_size
    return {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in zip(names, numbers, strict=True)}


def test_open_mpis_variables() -> None:
    here = find_place({**open_mpi(1, 2, 1, 2), "PMIX_NAMESPACE": "prterun-host-77@1"})
    assert facts(here) == ("MPI", 1, 2, 1, 2, "127.0.0.1")
    other = find_place({**open_mpi(1, 2, 1, 2), "PMIX_NAMESPACE": "prterun-host-78@1"})
    assert here.port != other.port
    assert facts(find_place({**open_mpi(3, 4, 1, 2), "MASTER_ADDR": "a"})) == ("MPI", 3, 4, 1, 2, "a")
    with pytest.raises(ValueError, match=r"started 4 ranks, 2 of them on this machine.*MASTER_ADDR"):
        find_place(open_mpi(3, 4, 1, 2))


def test_mpichs_variables() -> None:
    written = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert facts(find_place(written)) == ("MPI", 1, 2, 1, 2, "127.0.0.1")
    with pytest.raises(ValueError, match="rank 1 of 2, but MPI_LOCALRANKID and MPI_LOCALNRANKS aren't set"):
        find_place({"PMI_RANK": "1", "PMI_SIZE": "2"})


def test_mpirun_inside_slurm() -> None:
    # Its daemons are tasks of srun, one on each node, and their children inherit that.
    daemon = step(1, 2, "1(x2)")
    assert facts(find_place(daemon | open_mpi(3, 4, 1, 2) | {"MASTER_ADDR": "gpu07"})) == ("MPI", 3, 4, 1, 2, "gpu07")
    assert find_place({**ALLOCATION, **open_mpi(1, 2, 1, 2)}).started_by == "MPI"


def test_srun_with_pmi_is_sruns() -> None:
    assert find_place(step(3, PMI_RANK="3", PMI_SIZE="4")).started_by == "SLURM"


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (step(4), "SLURM_PROCID=4 is none of the 4 tasks"),
        (step(1, SLURM_LOCALID="2"), "SLURM_LOCALID=2 on node 0 of the step, but that node has 2 of its 4 tasks"),
        (step(1, SLURM_STEP_TASKS_PER_NODE="2,1"), "SLURM_STEP_TASKS_PER_NODE=2,1 are 3 tasks, but the step has 4"),
        (step(1, SLURM_STEP_TASKS_PER_NODE="two"), "SLURM_STEP_TASKS_PER_NODE is no list of tasks"),
        (step(1, SLURM_STEP_NODELIST="n[2-"), r"list of nodes.*n\[2-.*MASTER_ADDR"),
        (step(1, SLURM_PROCID="one"), "SLURM_PROCID='one' in the environment is no number"),
        (step(1) | open_mpi(0, 1, 0, 1), "rank 0 of 1 by OMPI_COMM_WORLD_RANK.*task 1 of 4 by SLURM_PROCID"),
        (step(1) | open_mpi(2, 4, 0, 2), "rank 2 of 4 by OMPI_COMM_WORLD_RANK.*task 1 of 4 by SLURM_PROCID"),
        (open_mpi(2, 2, 0, 1), "OMPI_COMM_WORLD_RANK=2 is none of the ranks of OMPI_COMM_WORLD_SIZE=2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is none of the ranks of WORLD_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "not MASTER_PORT"),
    ],
)
def test_contradictions_are_errors_with_both_numbers(written: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_place(written)


@pytest.mark.parametrize(
    ("written", "devices", "says"),
    [
        (step(0, 1, "1", "gpu07"), 4, "devices=4, but srun started 1 task.*--ntasks-per-node=4"),
        (step(0), 1, "devices=1 on each of 2 machines are 2 ranks, but srun started 4 tasks"),
        (step(0), 4, "devices=4 on each of 2 machines are 8 ranks, but srun started 4 tasks"),
        (step(0, 4, "3,1", SLURM_LOCALID="0"), 2, r"4 ranks, but srun started 4 tasks \(3, 1 on them in turn\)"),
        (open_mpi(0, 2, 0, 2), 4, "devices=4, but 2 ranks were started on this machine.*mpirun"),
    ],
)
def test_another_number_of_devices_is_refused(written: dict[str, str], devices: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_place(written).check_devices(devices, devices)


def test_the_same_number_of_devices_is_taken() -> None:
    find_place(step(0)).check_devices(2, 2)
    find_place(step(0)).check_devices(1, 4)


def test_an_allocation_without_srun_is_warned_of() -> None:
    batch = {**ALLOCATION, "SLURM_PROCID": "0"}
    with pytest.warns(UserWarning, match="123456 has 4 tasks, but srun didn't start this process: it trains on 1 rank"):
        warn_of_missing_srun(1, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_missing_srun(4, batch)  # as many ranks by Fit's own launcher
        warn_of_missing_srun(1, {})


LETTERS = st.text("abcxyz-.", min_size=1, max_size=3).filter(lambda text: "-" not in text[:1])


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The text between brackets, and the numbers it stands for, each written by itself."""
    texts, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        width, low, count = draw(st.integers(1, 4)), draw(st.integers(0, 99)), draw(st.integers(1, 12))
        written = [str(number).rjust(width, "0") for number in range(low, low + count)]
        texts.append(written[0] if count == 1 else f"{written[0]}-{written[-1]}")
        numbers += written
    return ",".join(texts), numbers


@st.composite
def names(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One entry of a list, and the names it stands for."""
    text, expanded = "", [""]
    for letters, ranges in draw(st.lists(st.tuples(LETTERS, st.none() | brackets()), min_size=1, max_size=3)):
        text += letters
        expanded = [name + letters for name in expanded]
        if ranges is not None:
            text += f"[{ranges[0]}]"
            expanded = [name + number for name in expanded for number in ranges[1]]
    return text, expanded


@given(st.lists(names(), min_size=1, max_size=4))
def test_lists_of_nodes(entries: list[tuple[str, list[str]]]) -> None:
    assert list(expand_nodes(",".join(text for text, _ in entries))) == [name for _, each in entries for name in each]


def test_lists_of_nodes_as_slurm_prints_them() -> None:
    assert list(expand_nodes("n[01-03,7],m4")) == ["n01", "n02", "n03", "n7", "m4"]
    assert list(expand_nodes("a[1-2]b[3-4]")) == ["a1b3", "a1b4", "a2b3", "a2b4"]
    assert list(expand_nodes("rack[1,3]-gpu.cluster,login")) == ["rack1-gpu.cluster", "rack3-gpu.cluster", "login"]
    assert list(expand_nodes("n[098-101]")) == ["n098", "n099", "n100", "n101"]
    assert list(expand_nodes("")) == []


@pytest.mark.parametrize("wrong", ["n[", "n[1-", "n]", "n[3-1]", "n[a-b]", "n[]", ",n", "n,", "n,,m", "n[1[2]]", "n m"])
def test_what_is_no_list_of_nodes(wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        list(expand_nodes(wrong))


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), min_size=1, max_size=5))
def test_tasks_on_each_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(str(tasks) if nodes == 1 else f"{tasks}(x{nodes})" for tasks, nodes in runs)
    assert list(expand_tasks(text)) == [tasks for tasks, nodes in runs for _ in range(nodes)]
