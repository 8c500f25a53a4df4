"""How often ranks talk: counted as the operations that reach torch's process groups, under real training."""

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks
from stratagem import Callback
from test_context_parallel import train_on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import Tagger, make_fit, token_rows

pytestmark = pytest.mark.slow

BLOCK = 6 + 6 + 24 * 6 + 24 + 24 * 6 + 6  # numbers in a Tagger's block
ROOT = 11 * 6 + 11  # trainable ones outside of the blocks: the tied weight once, and the head's bias

Message = tuple[str, str, int]  # operation, dtype, numbers


class Traffic(TorchDispatchMode):
    """Notes every operation of a process group, by where the run stands."""

    def __init__(self) -> None:
        super().__init__()
        self.where = "start"
        self.messages: dict[str, list[Message]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            sent = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            name = function._schema.name.partition("::")[2].strip("_")
            message = (name, str(sent.dtype).removeprefix("torch."), sent.numel())
            self.messages.setdefault(self.where, []).append(message)
        return function(*args, **(kwargs or {}))


class Marker(Callback):
    """Tells the traffic where the run stands: "update 3", "log 4"."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"update {state.global_step + 1}"

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"after {state.global_step}"

    def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.traffic.where = f"logged {state.global_step}"


class Reporting(Tagger):
    """Logs three numbers beside its loss."""

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = super().loss(outputs, batch)
        return {"loss": loss, "largest": outputs.max(), "smallest": outputs.min(), "spread": outputs.std()}


def listen(module: type[Tagger] = Tagger, **arguments: Any) -> dict[str, list[Message]]:
    """Train 8 updates of 4 micro-batches with a log after the 4th and the 8th; the messages by where they were sent."""
    traffic = Traffic()
    fit = make_fit(
        module(),
        token_rows(),
        max_steps=8,
        logging_steps=4,
        per_device_train_batch_size=2,
        callbacks=[Marker(traffic)],
        **{"gradient_accumulation_steps": 4, **arguments},
    )
    with traffic:
        fit.train()
    return traffic.messages


def update(messages: dict[str, list[Message]], number: int = 6) -> Counter[Message]:
    """What one update sent, from its first forward to its optimizer step. The 6th is like any other."""
    return Counter(messages[f"update {number}"])


# The item count, failed writes, buffers that change, wishes of signals, five numbers on what was read, and five flags
# of callbacks. Of 2 ranks each receives one message and sends one.
ITEMS_AND_FLAGS = [("recv", "int64", 14), ("send", "int64", 14)]
FLAGS = [(name, dtype, 5) for name, dtype, _ in ITEMS_AND_FLAGS]
NORM = ("allreduce", "float32", 1)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_ddp_reduces_once_an_update(ranks: dict[int, Ranks], accumulation: int) -> None:
    for messages in ranks[2].run(listen, strategy="ddp", gradient_accumulation_steps=accumulation):
        # One bucket holds all gradients. The buffers never change, and so are never sent.
        assert update(messages) == {("allreduce", "float32", 2 * BLOCK + ROOT): 1}


def test_ddp_reduces_each_bucket_once(ranks: dict[int, Ranks]) -> None:
    kibibyte = 2.0**-10
    for messages in ranks[2].run(listen, strategy="ddp", options={"bucket_cap_mb": kibibyte}):
        buckets = [message for message in update(messages).elements() if message[:2] == ("allreduce", "float32")]
        assert sum(numbers for _, _, numbers in buckets) == 2 * BLOCK + ROOT
        assert len(buckets) >= 3  # 737 numbers of 4 bytes don't fit into two


def test_static_graph_reduces_once_an_update(ranks: dict[int, Ranks]) -> None:
    for messages in ranks[2].run(listen, strategy="ddp", options={"static_graph": True}):
        assert update(messages)["allreduce", "float32", 2 * BLOCK + ROOT] == 1


# Three groups: two blocks, and the root with what is left. Of 2 ranks each holds half; of the 11 rows the first has 6.
HALVES = {(BLOCK + 1) // 2: 2, 6 * 6 + 6: 1}


@pytest.mark.parametrize(("accumulation", "reshard"), [(1, True), (4, True), (4, False)])
def test_fsdp2_reduces_each_group_once_an_update(ranks: dict[int, Ranks], accumulation: int, reshard: bool) -> None:
    options = {"reshard_after_forward": reshard}
    arguments = {"strategy": "fsdp2", "options": options, "gradient_accumulation_steps": accumulation}
    for messages in ranks[2].run(listen, **arguments):
        sent = update(messages)
        gathers_of_blocks = 2 * accumulation * (2 if reshard else 1)  # for forward, and again for backward
        assert sent == {
            **{("reduce_scatter_base", "float32", numbers): times for numbers, times in HALVES.items()},
            ("allgather_base", "float32", 2 * ((BLOCK + 1) // 2)): gathers_of_blocks,
            ("allgather_base", "float32", 2 * (6 * 6 + 6 + 3 * 6 + 3)): accumulation,  # with 3 rows of the frozen layer
            NORM: 1,
        }


def test_mixed_precision_gathers_matrices_in_16_bits(ranks: dict[int, Ranks]) -> None:
    matrices, norm = 24 * 6 + 24 + 24 * 6 + 6, 2 * 6
    for messages in ranks[2].run(listen, strategy="fsdp2", precision="bf16-mixed"):
        sent = update(messages)
        gathers = {(dtype, numbers): times for (name, dtype, numbers), times in sent.items() if "gather" in name}
        # As many messages as in float32, a block's in 684 bytes: 660 would be all in bfloat16, 1320 all in float32. The
        # weight that is tied to an embedding is in float32.
        assert gathers == {
            ("uint8", 2 * matrices + 4 * norm): 2 * 4 * 2,
            ("uint8", 2 * (4 * 6 * 6 + 2 * (6 + 3 * 6 + 3))): 4,
        }
        assert {dtype for name, dtype, _ in sent if "reduce_scatter" in name} == {"float32"}


def test_fsdp1_reduces_each_group_once_an_update(ranks: dict[int, Ranks]) -> None:
    for messages in ranks[2].run(listen, strategy="fsdp1"):
        sent = update(messages)
        assert sum(times for (name, _, _), times in sent.items() if name == "reduce_scatter_base") == 3
        assert sent[NORM] == 1
        assert {name for name, _, _ in sent} == {"reduce_scatter_base", "allgather", "allreduce"}


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2", "tp"])
def test_without_clipping_sharded_gradients_tell_in_one_number_that_they_are_finite(
    ranks: dict[int, Ranks], strategy: str
) -> None:
    clipped = ranks[2].run(listen, strategy=strategy)
    for messages, others in zip(ranks[2].run(listen, strategy=strategy, max_grad_norm=0.0), clipped, strict=True):
        assert update(messages) == update(others)  # that number takes the place of the norm


def test_without_clipping_ddp_sends_nothing_more(ranks: dict[int, Ranks]) -> None:
    for messages in ranks[2].run(listen, strategy="ddp", max_grad_norm=0.0):
        assert update(messages) == {("allreduce", "float32", 2 * BLOCK + ROOT): 1}


def test_tensor_parallel_sums_activations(ranks: dict[int, Ranks]) -> None:
    for messages in ranks[2].run(listen, strategy="tp"):
        sent = {message: times for message, times in update(messages).items() if "all" in message[0]}
        # 2 samples of 5 positions of 6 features: after each "rowwise" layer, and in backward before each "colwise" one.
        assert sent == {("all_reduce", "float32", 2 * 5 * 6): 2 * 2 * 4, NORM: 1}


def test_two_dimensions_reduce_each_group_once_an_update(ranks: dict[int, Ranks]) -> None:
    # A mesh with an equal part before it, whose process groups are others.
    train_on_ranks(ranks, "context-2-tensor-2", max_steps=2)
    for messages in ranks[4].run(listen, strategy="fsdp2", options={"tensor_parallel": 2}):
        sent = update(messages)
        assert sum(times for (name, _, _), times in sent.items() if name == "reduce_scatter_base") == 3
        # The norm: squares of layers cut both ways are summed over both dimensions, of the others over one.
        assert sent[NORM] == 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "tp"])
def test_nothing_else_is_sent_between_logs(ranks: dict[int, Ranks], strategy: str) -> None:
    for messages in ranks[2].run(listen, strategy=strategy):
        assert [messages[f"after {number}"] for number in (2, 5, 6)] == [ITEMS_AND_FLAGS] * 3
        # Before a log, two times of each rank ride along.
        with_times = [(name, dtype, numbers + 2 * 2) for name, dtype, numbers in ITEMS_AND_FLAGS]
        assert [messages[f"after {number}"] for number in (3, 7)] == [with_times] * 2
        # Once in a run, what the ranks hold alike is compared: whether buffers change, and one exchange of a hash.
        *compared, received, sent = messages["after 1"]
        assert [received, sent] == ITEMS_AND_FLAGS
        assert [name for name, _, _ in compared] == ["recv", "send", "allgather", "allgather"]


def test_the_ranks_message_takes_one_send_up_and_one_down_each_branch(ranks: dict[int, Ranks]) -> None:
    sent = [Counter(messages["after 6"]) for messages in ranks[4].run(listen, strategy="ddp")]
    up_or_down = [sum(numbers for (name, *_), numbers in of_rank.items() if name == "send") for of_rank in sent]
    # Rank 0 hears from 1 and 2, and 2 from 3; nothing else is sent, and nothing round a ring.
    assert up_or_down == [2, 1, 2, 1]
    assert [sorted(name for name, *_ in of_rank) for of_rank in sent] == [["recv", "send"]] * 4


LARGEST = 2**62 - 1


def sums(length: int) -> list[int]:
    """A few sums over the ranks, one after the other, of numbers that differ among them."""
    fit = make_fit(Tagger(), token_rows(), strategy="ddp")
    rank = fit.strategy.rank
    found = [fit.strategy.sum_on_host([rank + place - turn for place in range(length)]) for turn in range(3)]
    return [*found, fit.strategy.sum_on_host([LARGEST if rank == 1 else -rank])]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_hosts_sum_exactly(ranks: dict[int, Ranks], world: int) -> None:
    of_ranks = world * (world - 1) // 2
    expected = [[of_ranks + world * (place - turn) for place in range(20)] for turn in range(3)]
    assert ranks[world].run(sums, length=20) == [[*expected, [LARGEST - of_ranks + 1]]] * world


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_log_is_one_collective(ranks: dict[int, Ranks], strategy: str) -> None:
    for messages in ranks[2].run(listen, module=Reporting, strategy=strategy):
        # The loss and three more, of four updates, the numbers of items and tokens, and that of new names in logs.
        assert messages["after 4"] == [("allreduce", "float64", 4 * 4 + 3)]
        # Flags that on_log may have raised, and the next update's items.
        assert messages["logged 4"] == [*FLAGS, *ITEMS_AND_FLAGS]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_loss_scaling_agrees_in_one_collective(ranks: dict[int, Ranks], strategy: str) -> None:
    found = [ranks[2].run(listen, strategy=strategy, precision=name)[0] for name in ("bf16-mixed", "16-mixed")]
    assert update(found[1])[NORM] == update(found[0])[NORM] + 1


class Measured(Reporting):
    """Two metrics."""

    def metrics(self) -> dict[str, Any]:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        options = {"num_classes": 11, "ignore_index": -100}
        return {"accuracy": MulticlassAccuracy(**options), "f1": MulticlassF1Score(**options)}

    def metric_inputs(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return outputs.flatten(0, 1), batch["labels"].flatten()


def listen_to_evaluation(**arguments: Any) -> Counter[str]:
    fit = make_fit(Measured(), None, token_rows(50), per_device_eval_batch_size=3, **arguments)
    fit.place()
    traffic = Traffic()
    with traffic:
        fit.evaluate()
    return Counter(name for name, _, _ in traffic.messages["start"])


def test_evaluation_is_one_exchange(ranks: dict[int, Ranks]) -> None:
    # Nine batches on each rank, a loss with extras and two metrics: lengths, then contents.
    for sent in ranks[2].run(listen_to_evaluation, strategy="ddp"):
        assert sent == {"allgather": 2}


def groups_after_each(fits: int, **arguments: Any) -> list[int]:
    """The process groups that were made in this process up to the end of each of several runs."""
    counts = []
    for _ in range(fits):
        make_fit(Tagger(), token_rows(), max_steps=1, **arguments).train()
        counts.append(dist.get_pg_count())
    return counts


@pytest.mark.parametrize(("strategy", "options"), [("ddp", {}), ("fsdp2", {"replicas": 2, "tensor_parallel": 2})])
def test_a_second_fit_makes_no_new_groups(ranks: dict[int, Ranks], strategy: str, options: dict[str, Any]) -> None:
    # Each group has threads and connections of its own: hundreds of runs in one process would drown in them.
    for counts in ranks[4].run(groups_after_each, fits=3, strategy=strategy, options=options):
        assert counts[0] == counts[1] == counts[2]
