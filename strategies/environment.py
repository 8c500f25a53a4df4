"""This process's place among the ranks of a run, as whoever started it wrote it into the environment."""

import os
import socket
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .node_list import expand_nodes, expand_tasks

TORCHRUN, SLURM, MPI, ALONE = "torchrun", "SLURM", "MPI", "alone"
LOCALHOST = "127.0.0.1"
PORTS = range(15000, 29500)  # below those that systems hand out to whoever asks for any
TORCHS_PORT = 29500
# Steps that srun didn't start: the batch script, and the shell of an salloc that runs on a node of the allocation.
LAST_STEP = 0xFFFFFFF0
# Variables of mpirun: rank, size, rank and size on this machine.
OPEN_MPI = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
MPICH = "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"  # Intel's MPI has the same


@dataclass(frozen=True)
class Place:
    """Where a process is among the ranks of its run.

    Attributes:
        started_by: "torchrun" (or another launcher that sets RANK and WORLD_SIZE), "SLURM", "MPI", or "alone".
        rank, world_size: this process among all ranks.
        local_rank, local_world_size: this process among the ranks of its machine.
        ranks_by_node: ranks on each machine, where it is known (SLURM says so).
        address, port: where rank 0 keeps the store that the ranks meet by; without meaning for a world of one.
        launcher_keeps_store: the launcher keeps it instead.
        attempt: how often the launcher has started the ranks again.
        host: the name of this machine.
    """

    started_by: str = ALONE
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    ranks_by_node: tuple[int, ...] = ()
    address: str = LOCALHOST
    port: int = 0
    launcher_keeps_store: bool = False
    attempt: int = 0
    host: str = field(default_factory=socket.gethostname)

    @property
    def is_alone(self) -> bool:
        """Whether nobody started this process as a rank."""
        return self.started_by == ALONE

    def check_devices(self, fewest: int, most: int) -> None:
        """Refuse a number of ranks on each machine, or a range of them, that isn't what was started.

        Raises:
            ValueError: the message has both numbers.
        """
        nodes = self.ranks_by_node or (self.local_world_size,)
        if all(fewest <= ranks <= most for ranks in nodes):
            return
        devices = f"devices={most}" if fewest == most else f"devices='{fewest}:{most}'"
        if self.started_by != SLURM:
            starter = "mpirun" if self.started_by == MPI else "torchrun"
            raise ValueError(
                f"{devices}, but {self.local_world_size} ranks were started on this machine. Leave devices out with "
                f"{starter}."
            )
        asked = f"{devices} on each of {len(nodes)} machines are {most * len(nodes)} ranks"
        started = f"srun started {self.world_size} task{'s' * (self.world_size > 1)}"
        layout = f" ({', '.join(map(str, nodes))} on them in turn)" if len(nodes) > 1 else ""
        raise ValueError(
            f"{asked if len(nodes) > 1 else devices}, but {started}{layout}. Write srun --ntasks-per-node={most} "
            f"--nodes={len(nodes)} (and the same for sbatch or salloc), or leave devices out."
        )


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Find this process's place among ranks: by torchrun's variables, else SLURM's, else MPI's, else it is alone.

    The variables of SLURM count for a process that srun started: the shell of an allocation, and a batch script, have
    most of them, too. mpirun starts its daemons by srun, so where it has more ranks than that step has tasks, it is
    the one that counts.

    Args:
        environment: variables.

    Raises:
        ValueError: they contradict one another, or lack what is needed; the message has the numbers and says what to
            set.

    Example:
        >>> job = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        ...        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
        >>> place = find_place({**job, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"})
        >>> place.rank, place.world_size, place.local_rank, place.address
        (3, 4, 1, 'n1')
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _by_torchrun(environment)
    tasks = _tasks(environment) if _is_step(environment) else 0
    names = next((names for names in (OPEN_MPI, MPICH) if {*names[:2]} <= environment.keys()), None)
    if names is None:
        return _by_slurm(environment, tasks) if tasks else Place(local_rank=_number(environment, "LOCAL_RANK", "0"))
    rank, size = (_number(environment, name) for name in names[:2])
    if size > tasks:
        return _by_mpi(environment, names)
    if size < tasks or rank != _number(environment, "SLURM_PROCID"):
        raise ValueError(
            f"This process is rank {rank} of {size} by {names[0]} and {names[1]}, and task "
            f"{environment['SLURM_PROCID']} of {tasks} by SLURM_PROCID and SLURM_STEP_NUM_TASKS. Start it by mpirun or "
            "by srun, from a shell that neither of them has started."
        )
    return _by_slurm(environment, tasks)


def warn_of_missing_srun(ranks: int, environment: Mapping[str, str] = os.environ) -> None:
    """Warn where a process is alone in a SLURM job that has tasks for several.

    Args:
        ranks: that this process starts by itself, or 1.
        environment: variables.
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and tasks.isdigit() and int(tasks) > 1 and int(tasks) != ranks:
        warnings.warn(
            f"SLURM's job {environment['SLURM_JOB_ID']} has {tasks} tasks, but srun didn't start this process: it "
            f"trains on {ranks} rank{'s' * (ranks > 1)}. Write srun python ... to train on {tasks}.",
            stacklevel=4,
        )


def _by_torchrun(environment: Mapping[str, str]) -> Place:
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} is none of the ranks of WORLD_SIZE={world_size}: they count from 0.")
    place = Place(
        TORCHRUN,
        rank,
        world_size,
        _number(environment, "LOCAL_RANK", "0"),
        _number(environment, "LOCAL_WORLD_SIZE", str(world_size)),
        launcher_keeps_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
    )
    if world_size == 1 and "MASTER_PORT" not in environment:
        return place
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set, but not {' and '.join(missing)}: the machine of rank 0, "
            "and a free port there. torchrun sets them all."
        )
    return replace(place, address=environment["MASTER_ADDR"], port=_number(environment, "MASTER_PORT"))


def _is_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, or a script that it is in."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"} <= environment.keys():
        return False
    if _number(environment, "SLURM_STEP_ID") >= LAST_STEP:
        return False
    # srun --pty bash is a shell for whatever one types; srun --pty python is a task.
    in_shell = "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(os.getpid())
    return not (in_shell and _tasks(environment) == 1)


def _tasks(environment: Mapping[str, str]) -> int:
    """The tasks of this process's step."""
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    return _number(environment, name, "1")


def _by_slurm(environment: Mapping[str, str], tasks: int) -> Place:
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID", "0")
    if rank >= tasks:
        raise ValueError(f"SLURM_PROCID={rank} is none of the {tasks} tasks of its step: they count from 0.")
    nodes = next((environment[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if n in environment), "")
    by_node = _tasks_by_node(environment, tasks, nodes)
    node = _number(environment, "SLURM_NODEID", "0") if len(by_node) > 1 else 0
    local_world_size = by_node[node] if node < len(by_node) else 0
    if local_rank >= local_world_size:
        raise ValueError(
            f"SLURM_LOCALID={local_rank} on node {node} of the step, but that node has {local_world_size} of its "
            f"{tasks} tasks, which are {', '.join(map(str, by_node))} on the nodes in turn."
        )
    address = environment.get("MASTER_ADDR", "")
    if not address and len(by_node) > 1:
        try:
            address = next(expand_nodes(nodes), "")
        except ValueError as error:
            raise ValueError(f"SLURM's list of nodes is {error} Set MASTER_ADDR to the machine of task 0.") from error
        if not address:
            raise ValueError(
                f"srun started {tasks} tasks on {len(by_node)} nodes, but SLURM_STEP_NODELIST and SLURM_JOB_NODELIST, "
                "whose first one they would meet on, are not set. Set MASTER_ADDR to the machine of task 0."
            )
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    # Jobs that share a machine have numbers near one another, and so have the steps of a job.
    port = PORTS[(job + 997 * step) % len(PORTS)]
    return Place(
        SLURM,
        rank,
        tasks,
        local_rank,
        local_world_size,
        by_node,
        address or LOCALHOST,
        _number(environment, "MASTER_PORT", str(port)),
    )


def _tasks_by_node(environment: Mapping[str, str], tasks: int, nodes: str) -> tuple[int, ...]:
    """The tasks of a step on each of its nodes."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environment:
            try:
                by_node = expand_tasks(environment[name])
            except ValueError as error:
                raise ValueError(f"{name} is {error}") from error
            if sum(by_node) == tasks:
                return by_node
            if name.startswith("SLURM_STEP"):
                raise ValueError(f"{name}={environment[name]} are {sum(by_node)} tasks, but the step has {tasks}.")
    count = len(list(expand_nodes(nodes))) if nodes else 1
    each = _number(environment, "SLURM_NTASKS_PER_NODE", str(-(-tasks // count)))
    if each * count != tasks:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE isn't set, and {tasks} tasks on {count} node{'s' * (count > 1)} are not {each} "
            "on each: nothing says how many are on this one. Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT."
        )
    return (each,) * count


def _by_mpi(environment: Mapping[str, str], names: tuple[str, str, str, str]) -> Place:
    rank, world_size = (_number(environment, name) for name in names[:2])
    if rank >= world_size:
        raise ValueError(f"{names[0]}={rank} is none of the ranks of {names[1]}={world_size}: they count from 0.")
    if world_size == 1:
        return Place(MPI)
    missing = [name for name in names[2:] if name not in environment]
    if missing:
        raise ValueError(
            f"mpirun started rank {rank} of {world_size}, but {' and '.join(missing)} aren't set, so that nothing says "
            "which rank of its machine this is. Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT."
        )
    local_rank, local_world_size = (_number(environment, name) for name in names[2:])
    if local_rank >= local_world_size or local_world_size > world_size:
        raise ValueError(
            f"{names[2]}={local_rank} and {names[3]}={local_world_size} can't be for a rank of {names[1]}={world_size}."
        )
    address = environment.get("MASTER_ADDR", LOCALHOST if local_world_size == world_size else "")
    if not address:
        raise ValueError(
            f"mpirun started {world_size} ranks, {local_world_size} of them on this machine, and doesn't say where "
            "rank 0 is. Pass the name of its machine on: mpirun -x MASTER_ADDR=... (with MPICH and Intel MPI -genv "
            "MASTER_ADDR ...)."
        )
    run = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid"))
    port = TORCHS_PORT if run is None else PORTS[zlib.crc32(run.encode()) % len(PORTS)]
    port = _number(environment, "MASTER_PORT", str(port))
    return Place(MPI, rank, world_size, local_rank, local_world_size, address=address, port=port)


def _number(environment: Mapping[str, str], name: str, otherwise: str | None = None) -> int:
    """Read a variable that is a number.

    Raises:
        ValueError: it isn't set, and there is nothing to take otherwise; or it is no number.
    """
    value = environment.get(name, otherwise)
    if value is None:
        raise ValueError(f"{name} isn't set in the environment.")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} in the environment is no number from 0 on.")
    return int(value)
