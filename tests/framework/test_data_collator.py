"""``data_collator``: a function of a list of samples to a batch, wherever a Fit makes batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import classifying_bert, masked_bert
from stratagem import Fit, FitArguments, TrainModule
from stratagem.framework.configuration.targets import Target
from stratagem.framework.data import DataStream, make_stream
from stratagem.strategies import Strategy
from tiny import MakeFit, Numbers, NumberStream, Regressor, StopAt, logs_of, parameters_of, regression_rows
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler


def total(samples: list[int]) -> dict[str, Any]:
    """A collator: how many samples there are, and their sum."""
    assert isinstance(samples, list)
    return {"count": len(samples), "sum": sum(samples)}


def stream_of(data: Any, collator: Any, training: bool = True, **arguments: Any) -> DataStream:
    strategy = Strategy()
    strategy.data_rank, strategy.data_size = 0, 1
    return make_stream(data, FitArguments(**arguments), strategy, collator, training=training)


KINDS = {
    "dataset": Numbers(10),
    "iterable": NumberStream(10),
    "loader": DataLoader(Numbers(10), batch_size=4),
    "loader with a sampler": DataLoader(Numbers(10), batch_size=4, sampler=WeightedRandomSampler([1.0] * 10, 10)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_made_by_it(kind: str, workers: int) -> None:
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    for training in (True, False):
        data = KINDS[kind]
        if workers and isinstance(data, DataLoader):
            data = DataLoader(data.dataset, batch_size=4, sampler=data.sampler, num_workers=workers)
        stream = stream_of(data, total, training, dataloader_num_workers=workers, **sizes)
        batches = list(stream.epoch(0))
        assert sum(batch["count"] for batch in batches) == 10 and batches[0]["count"] == 4
        assert kind.endswith("sampler") or sum(batch["sum"] for batch in batches) == 45


@pytest.mark.parametrize("sampler", [None, WeightedRandomSampler([1.0] * 10, 10)])
def test_a_loader_with_a_collation_of_its_own_is_refused(sampler: Any) -> None:
    why = (
        r"data_collator=<function total.*> makes a batch of samples, and the DataLoader that Fit was given has a "
        "collate_fn of its own. Leave data_collator out, or give Fit the dataset itself"
    )
    with pytest.raises(ValueError, match=why):
        stream_of(DataLoader(Numbers(10), collate_fn=list, sampler=sampler), total)
    with pytest.raises(ValueError, match="the DataLoader that Fit was given hands on what its dataset gives"):
        stream_of(DataLoader(Numbers(10), batch_size=None), total)


def test_what_workers_cannot_be_sent_is_said_where_they_are_sent_it() -> None:
    loaders = {
        method: DataLoader(Numbers(10), batch_size=4, num_workers=1, multiprocessing_context=method)
        for method in ("fork", "spawn")
    }
    by_lambda: Any = lambda samples: total(samples)  # noqa: E731
    assert [batch["count"] for batch in stream_of(loaders["fork"], by_lambda).epoch(0)] == [4, 4, 2]
    why = (
        r"data_collator=<function.* can't be sent to the worker processes that load data, which start by 'spawn': "
        ".*[Pp]ickle.*Define the function, or the class, at the top"
    )
    with pytest.raises(TypeError, match=why):
        stream_of(loaders["spawn"], by_lambda)
    with pytest.raises(TypeError, match=why):  # whatever its order is
        sampler = WeightedRandomSampler([1.0] * 10, 10)
        stream_of(DataLoader(Numbers(10), sampler=sampler, num_workers=1, multiprocessing_context="spawn"), by_lambda)


@pytest.mark.slow
def test_spawned_workers_collate() -> None:
    loader = DataLoader(Numbers(10), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert [batch["count"] for batch in stream_of(loader, total).epoch(0)] == [4, 4, 2]


class Halved:
    """A collator that has every other sample twice, so that what it computes is its own."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.calls.append(len(samples))
        return {name: torch.stack([sample[name] for sample in samples]) * 0.5 for name in samples[0]}


def test_training_evaluation_prediction_and_the_summary_use_it(make_fit: MakeFit) -> None:
    rows = regression_rows(10)
    halved = [{name: value * 0.5 for name, value in row.items()} for row in rows]
    results = []
    for data, collator in ((rows, Halved()), (halved, None)):
        torch.manual_seed(1)
        fit = make_fit(Regressor(), data, eval_data=data, data_collator=collator, max_steps=3,
                       per_device_train_batch_size=5, per_device_eval_batch_size=4)  # fmt: skip
        fit.train()
        results.append((parameters_of(fit.module), fit.evaluate(), fit.predict(data).predictions))
        if collator is not None:
            # Training reads ahead of its last update, in the same pass of the data, by nothing.
            assert collator.calls == [5, 5, 5, 4, 4, 2, 4, 4, 2]
            assert "one sample" in str(fit.summary())
            assert collator.calls[-1] == 1
    assert all(value.equal(results[1][0][name]) for name, value in results[0][0].items())
    assert results[0][1] == results[1][1] and results[0][2].equal(results[1][2])


# transformers' collators.


def tokenizer() -> Any:
    """A tokenizer of numbers as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[MASK]": 1, "[CLS]": 2, **{str(i): i for i in range(3, 64)}}
    of_words = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=of_words, pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", unk_token="[PAD]"
    )


class Texts(Dataset):
    """Texts of several lengths as a tokenizer gives them: lists of numbers."""

    def __init__(self, words: Any, labels: bool) -> None:
        self.rows = []
        for i in range(24):
            row = dict(words(" ".join(str(3 + (i * j) % 60) for j in range(2 + i % 7)), return_token_type_ids=False))
            self.rows.append({**row, "labels": i % 3} if labels else row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["padding", "masking"])
def test_transformers_collators_pad_and_mask_and_a_resume_is_exact(
    make_fit: MakeFit, tmp_path: Path, kind: str, workers: int
) -> None:
    import transformers

    words = tokenizer()
    data = Texts(words, labels=kind == "padding")
    collators = {
        "padding": transformers.DataCollatorWithPadding(words),
        "masking": transformers.DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.4),
    }
    arguments: dict[str, Any] = {
        "data_collator": collators[kind], "per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1,
        "dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": 4,
    }  # fmt: skip

    def made(name: str, **more: Any) -> Fit:
        torch.manual_seed(0)
        model = classifying_bert() if kind == "padding" else masked_bert()
        directory = str(tmp_path / name)
        return make_fit(TrainModule.wrap(model), data, eval_data=data, output_dir=directory, **arguments, **more)

    whole, cut = made("whole"), made("cut", callbacks=[StopAt(4)])
    whole.train()
    cut.train()
    resumed = made("cut")
    resumed.train(resume_from_checkpoint=True)
    assert logs_of(resumed)[-4:] == logs_of(whole)[-4:]
    assert all(value.equal(parameters_of(whole.module)[name]) for name, value in parameters_of(resumed.module).items())
    assert whole.evaluate()["eval_loss"] > 0.0
    assert len(whole.predict(data).predictions["logits"]) == 24


def test_a_default_data_collator_of_transformers(make_fit: MakeFit) -> None:
    from transformers import default_data_collator

    rows = regression_rows(8)
    found = []
    for collator in (default_data_collator, None):
        torch.manual_seed(0)
        fit = make_fit(Regressor(), rows, max_steps=2, data_collator=collator)
        fit.train()
        found.append(logs_of(fit))
    assert found[0] == found[1]


# Configuration.


def test_a_target_gives_it(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        return {"module": Regressor(), "train_data": regression_rows(4), "data_collator": total}

    assert Target("", build).make({}, {})["data_collator"] is total
    fit = Fit(**build(), max_steps=1, output_dir=str(tmp_path), progress=False)
    assert "data_collator" in fit.written.given and "data_collator" in fit.written.text(fit.args, tmp_path / "c.yaml")
