"""Model cards: what the Hub's own parser reads in them is what the run was, and nobody's own card is replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import llama, make, text_rows, with_adapters
from stratagem import Average, TrainModule
from stratagem.framework.record.card import MARK, is_free, yaml_lines
from tiny import MakeFit

pytestmark = pytest.mark.slow  # transformers takes seconds to import


def card_in(directory: Path) -> Any:
    """Parse a card as the Hub does, and hold it against the Hub's rules as far as they are known offline."""
    from huggingface_hub import ModelCard

    return ModelCard.load(directory / "README.md")


def test_a_card_says_what_the_run_was(make_fit: MakeFit, tmp_path: Path) -> None:
    model = llama()
    model.config._name_or_path = "somebody/tiny-llama"
    rows = text_rows(16)
    fit = make_fit(
        TrainModule.wrap(model), rows, text_rows(8), max_steps=4, learning_rate=0.01, eval_strategy="steps",
        eval_steps=2, run_name="tuned llama", per_device_train_batch_size=4,
    )  # fmt: skip
    fit.train()
    fit.save_pretrained(tmp_path / "model")
    card = card_in(tmp_path / "model")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "somebody/tiny-llama" and card.data.tags == ["stratagem", "llama"]
    (result,) = card.data.eval_results
    last = [log for log in fit.state.log_history if "eval_loss" in log][-1]
    assert last["step"] == 4
    assert (result.metric_name, result.metric_value) == ("eval_loss", last["eval_loss"])
    assert (result.task_type, result.dataset_name) == ("text-generation", "list, 8 samples")
    assert card.data.model_name == "tuned llama"
    text = card.text
    for said in (
        "# tuned llama", "- Data: list, 16 samples", "- Updates: 4, of 4 samples each", "- Epochs: 1\n",
        "`single`, `32-true`, 1 rank (cpu, ",
        "| learning_rate | 0.01 |", f"| torch | {torch.__version__} |", "| eval_loss |",
        "| train_loss |", "| stratagem |",
    ):  # fmt: skip
        assert said in text, said
    assert str(tmp_path) not in card.content  # no place of this machine is published
    assert "eval_runtime" not in text
    again = make_fit(TrainModule.wrap(llama()), rows, max_steps=1)
    again.train()
    again.save_pretrained(tmp_path / "model")  # ours is written anew
    assert "- Updates: 1, of" in (tmp_path / "model" / "README.md").read_text()
    assert card_in(tmp_path / "model").data.eval_results is None


def test_whose_numbers_they_are(make_fit: MakeFit, tmp_path: Path) -> None:
    """Only those of the weights that are saved: the best ones, an average, and none of weights that were loaded."""
    rows, average = text_rows(16), Average(decay=0.5, evaluate=True)
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fit = make_fit(
        TrainModule.wrap(llama()), rows, text_rows(8), max_steps=3, learning_rate=30.0, load_best_model_at_end=True,
        callbacks=[average], **options,
    )  # fmt: skip
    fit.train()
    best = fit.state.best_global_step
    assert best < 3
    fit.save_pretrained(tmp_path / "best")
    (result,) = card_in(tmp_path / "best").data.eval_results
    assert result.metric_value == fit.state.best_metric
    assert f"of update {best}, the best by eval_loss" in card_in(tmp_path / "best").text
    fit.save_pretrained(tmp_path / "average", weights=average)
    assert [each.metric_name for each in card_in(tmp_path / "average").data.eval_results or []] in (
        [],
        ["eval_average_loss"],
    )
    assert "averaged: `Average(" in card_in(tmp_path / "average").text
    fit.load_weights(tmp_path / "best")
    fit.save_pretrained(tmp_path / "loaded")
    card = card_in(tmp_path / "loaded")
    assert card.data.eval_results is None and "## Training" not in card.text and "- Weights: `best`" in card.text
    fit.train()
    fit.save_pretrained(tmp_path / "trained")
    assert "- Began with the weights of: `best`" in card_in(tmp_path / "trained").text


def test_adapters_name_their_base(make_fit: MakeFit, tmp_path: Path) -> None:
    model = with_adapters(llama())
    model.peft_config["default"].base_model_name_or_path = "somebody/tiny-llama"
    fit = make_fit(TrainModule.wrap(model), text_rows(16), max_steps=1)
    fit.train()
    fit.save_pretrained(tmp_path / "adapters")
    card = card_in(tmp_path / "adapters")
    assert (card.data.library_name, card.data.base_model) == ("peft", "somebody/tiny-llama")
    assert "lora" in card.data.tags and MARK in card.content


def test_a_card_of_the_users_stays_and_may_be_left_out(make_fit: MakeFit, tmp_path: Path) -> None:
    fit = make_fit(TrainModule.wrap(llama()), text_rows(16), max_steps=1)
    fit.save_pretrained(tmp_path / "untrained")
    assert "## Training" not in card_in(tmp_path / "untrained").text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own words")
    assert not is_free(tmp_path / "mine")
    fit.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"
    fit.save_pretrained(tmp_path / "without", model_card=False)
    assert not (tmp_path / "without" / "README.md").exists()
    other = make_fit(make("masked bert"), max_steps=1)  # without data
    other.save_pretrained(tmp_path / "bert")
    assert card_in(tmp_path / "bert").data.pipeline_tag == "fill-mask"


def test_front_matter_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    value = {
        "a": "colon: and 'quotes' \u00e9",
        "b": ["x", 1, {"c": [{"d": 1.5, "e": None}]}],
        "f": {"g": True, "h": "no", "i": "NULL"},
    }
    assert yaml.safe_load("\n".join(yaml_lines(value))) == json.loads(json.dumps(value))
