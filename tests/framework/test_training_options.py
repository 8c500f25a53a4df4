"""Label smoothing, NEFTune, activation checkpointing, token counts and the rest of the specification's options."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from stratagem import Callback, TrainModule
from tiny import (
    CLASSES,
    Float64,
    MakeFit,
    Regressor,
    Tagger,
    collate,
    logs_of,
    parameters_of,
    regression_rows,
    token_rows,
)
from torch import Tensor, nn


class CausalTagger(Tagger):
    """Position i predicts label i + 1."""

    causal = True


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_label_smoothing_is_its_formula(causal: bool, accumulation: int, make_fit: MakeFit) -> None:
    rows, epsilon = token_rows(6), 0.2
    module: Tagger = CausalTagger() if causal else Tagger()
    by_hand = Tagger()
    by_hand.load_state_dict(module.state_dict())
    by_hand.double()
    batch = collate(rows)
    log_p = by_hand(batch["tokens"]).log_softmax(-1)
    labels = batch["labels"]
    if causal:
        log_p, labels = log_p[:, :-1], labels[:, 1:]
    counts = labels != -100
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    smoothed = (1 - epsilon) * nll + epsilon * -log_p.mean(-1)
    expected = (smoothed * counts).sum() / counts.sum()
    expected.backward()

    fit = make_fit(
        module,
        rows,
        precision=Float64(),
        max_steps=1,
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=epsilon,
        logging_steps=1,
    )
    fit.train()
    assert fit.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-12)
    for (name, after), before in zip(module.named_parameters(), by_hand.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_label_smoothing_without_logits_lists_the_keys(make_fit: MakeFit) -> None:
    class Odd(Tagger):
        def forward(self, tokens: Tensor) -> Any:
            return {"scores": super().forward(tokens)}

    with pytest.raises(ValueError, match="needs the logits, and forward's outputs have the keys scores"):
        make_fit(Odd(), token_rows(4), max_steps=1, label_smoothing_factor=0.1).train()


def test_neftune_adds_noise_of_the_papers_size_in_training_only(make_fit: MakeFit) -> None:
    seen: list[tuple[bool, Tensor]] = []

    class Watched(Tagger):
        def forward(self, tokens: Tensor) -> Tensor:
            embedded = self.embed(tokens)
            seen.append((self.training, (embedded - self.embed.weight[tokens]).detach()))
            return self.head(embedded)

    module = Watched()
    rows = token_rows(4)[1:]
    fit = make_fit(module, rows, rows, max_steps=8, neftune_noise_alpha=3.0, eval_strategy="steps", eval_steps=4)
    fit.train()
    bound = 3.0 / math.sqrt(6 * 5)  # 6 positions, 5 features
    training = torch.cat([noise.flatten() for trains, noise in seen if trains])
    evaluation = torch.cat([noise.flatten() for trains, noise in seen if not trains])
    assert evaluation.abs().max() == 0
    assert 0.9 * bound < training.abs().max() <= bound * (1 + 1e-5)
    # A uniform distribution on ±b has the standard deviation b / sqrt(3).
    assert training.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not module.embed._forward_hooks


def test_neftune_finds_embeddings_that_are_built_late_and_leaves_no_hook_after_a_failure(make_fit: MakeFit) -> None:
    class Late(Tagger):
        def __init__(self) -> None:
            super().__init__()
            del self.embed
            self.noise: list[float] = []

        def build(self) -> None:
            self.embed = nn.Embedding(CLASSES, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            embedded = self.embed(tokens)
            self.noise.append((embedded - self.embed.weight[tokens]).abs().max().item())
            if len(self.noise) == 3:
                raise RuntimeError("the third forward")
            return self.head(embedded)

    module = Late()
    fit = make_fit(module, token_rows(4)[1:], max_steps=8, neftune_noise_alpha=3.0)
    with pytest.raises(RuntimeError, match="the third forward"):
        fit.train()
    assert all(0 < noise <= 3.0 / math.sqrt(30) * (1 + 1e-5) for noise in module.noise)
    assert not module.embed._forward_hooks


class Deep(TrainModule):
    """Eight blocks that keep much more between forward and backward than their inputs."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8)) for _ in range(blocks)
        )
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["y"])


def test_gradient_checkpointing_keeps_less_and_computes_the_same(make_fit: MakeFit) -> None:
    rows, initial = regression_rows(16, features=8), parameters_of(Deep())
    results = {}
    for recompute in (False, True):
        module = Deep()
        module.load_state_dict(initial)
        kept: list[int] = []

        class Count(Callback):
            """Bytes that autograd keeps for backward, by torch's own hook on what it saves."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
                self.hooks = torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor)
                self.hooks.__enter__()

            def save(self, tensor: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(tensor.nbytes)
                return tensor

            def on_train_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
                self.hooks.__exit__(None, None, None)

        options: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.01, "gradient_checkpointing": recompute}
        make_fit(module, rows, per_device_train_batch_size=16, callbacks=[Count()], **options).train()
        results[recompute] = parameters_of(module), sum(kept)
    for name, value in results[False][0].items():
        assert torch.equal(results[True][0][name], value), name
    assert list(results[True][0]) == list(results[False][0])
    # Autograd keeps the blocks' inputs, and for each what the recomputation of one block saves.
    assert results[True][1] < 0.5 * results[False][1]


def test_a_copy_of_a_module_with_recomputed_blocks_computes_with_its_own_weights(make_fit: MakeFit) -> None:
    module = Deep()
    make_fit(module, regression_rows(4, features=8), max_steps=1, gradient_checkpointing=True).train()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.zero_()
    x = torch.randn(4, 8)
    torch.testing.assert_close(twin.train()(x), twin.head(x))  # blocks of zeros add nothing
    assert not torch.allclose(module.eval()(x), module.head(x))


def test_a_model_with_a_method_of_its_own_is_asked_to_recompute(make_fit: MakeFit) -> None:
    class Own(Deep):
        asked: list[Any] = []

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
            self.asked.append(gradient_checkpointing_kwargs)

    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}}
    make_fit(Own(), regression_rows(4, features=8), max_steps=1, **options).train()
    assert Own.asked == [{"use_reentrant": False, "preserve_rng_state": False}]


def test_the_accelerators_cache_is_emptied_every_few_updates(
    make_fit: MakeFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[int] = []
    fit = make_fit(Regressor(), regression_rows(4), max_steps=7, torch_empty_cache_steps=3)
    fit.train()  # without an accelerator there is nothing to empty
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator.memory, "empty_cache", lambda: emptied.append(fit.state.global_step))
    fit.train()
    assert emptied == [3, 6]


def test_gradient_checkpointing_needs_blocks(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="needs blocks to recompute, and Regressor has no list"):
        make_fit(Regressor(), regression_rows(4), max_steps=1, gradient_checkpointing=True).train()


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_keep_their_names(make_fit: MakeFit) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, initial = regression_rows(16, features=8), parameters_of(Deep(2))
    results = {}
    for compiled in (False, True):
        module = Deep(2)
        for block in module.blocks:
            block[2] = nn.Dropout(0.0)  # type: ignore[index]
        module.load_state_dict(initial)
        fit = make_fit(module, rows, max_steps=4, learning_rate=0.01, torch_compile=compiled, logging_steps=1)
        fit.train()
        results[compiled] = [line["loss"] for line in logs_of(fit)], list(module.state_dict())
        # The blocks are nn.Sequential, which torch.compile would leave alone; all of them are one graph.
        assert bool(torch._dynamo.utils.counters["frames"]["ok"]) is compiled
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
        told = [line["first_step_seconds"] for line in fit.state.log_history if "first_step_seconds" in line]
        assert len(told) == compiled and all(seconds > 0.01 for seconds in told)
    assert results[True][0] == pytest.approx(results[False][0], rel=1e-5)
    assert results[True][1] == results[False][1]


class Named(Tagger):
    """Tokens under the name that transformers gives them."""

    pad_token_id = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids)


def named_rows(mask: bool) -> list[dict[str, Tensor]]:
    """Four rows of six tokens, of which the last i are padding."""
    rows = []
    for i, row in enumerate(token_rows(4)):
        tokens = row["tokens"].clamp(min=1)
        tokens[6 - i :] = 0
        extra = {"attention_mask": (tokens != 0).long()} if mask else {}
        rows.append({"input_ids": tokens, "labels": row["labels"], **extra})
    return rows


@pytest.mark.parametrize(("which", "mask", "expected"), [("all", False, 24), ("non_padding", True, 18)])
def test_tokens_are_counted(which: str, mask: bool, expected: int, make_fit: MakeFit) -> None:
    options: dict[str, Any] = {"include_num_input_tokens_seen": which, "include_tokens_per_second": True}
    fit = make_fit(Named(), named_rows(mask), num_train_epochs=2, logging_steps=4, **options)
    output = fit.train()
    assert fit.state.num_input_tokens_seen == 2 * expected
    assert logs_of(fit)[-1]["num_input_tokens_seen"] == 2 * expected
    assert logs_of(fit)[-1]["tokens_per_second"] > 0
    assert output.metrics["train_tokens_per_second"] == pytest.approx(
        2 * expected / output.metrics["train_runtime"], rel=1e-9
    )
    parameters = sum(p.numel() for p in fit.module.parameters())
    assert output.metrics["total_flos"] == 6 * parameters * 2 * expected


def test_padding_is_told_by_the_pad_token(make_fit: MakeFit) -> None:
    fit = make_fit(Named(), named_rows(mask=False), num_train_epochs=1, include_num_input_tokens_seen="non_padding")
    fit.train()
    assert fit.state.num_input_tokens_seen == 18


def test_padding_that_nothing_tells_is_counted_with_one_warning(make_fit: MakeFit) -> None:
    class Untold(Tagger):
        main_input_name = "tokens"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
        fit = make_fit(Untold(), token_rows(8), include_num_input_tokens_seen="non_padding", **options)
        fit.train()
    said = [str(warning.message) for warning in caught if "counts all tokens" in str(warning.message)]
    assert len(said) == 1
    assert "no 'attention_mask' and the module no pad_token_id" in said[0]
    assert fit.state.num_input_tokens_seen == 2 * 8 * 6


def test_a_batch_without_the_main_input_is_refused(make_fit: MakeFit) -> None:
    with pytest.raises(ValueError, match="Tokens are counted in the batch's 'input_ids', and the batch has the keys"):
        make_fit(Tagger(), token_rows(4), max_steps=1, include_num_input_tokens_seen="all").train()


class Remembering(Tagger):
    """Hands on the sum of all tokens it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[float | None] = []

    def forward(self, tokens: Tensor, mems: Tensor | None = None) -> Any:  # type: ignore[override]
        self.handed.append(None if mems is None else mems.item())
        total = tokens.sum().float() + (0.0 if mems is None else mems)
        return {"logits": super().forward(tokens), "memory": total}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(outputs["logits"], batch)


def test_past_index_hands_on_and_is_cleared_each_epoch(make_fit: MakeFit) -> None:
    rows, module = token_rows(3)[1:] + token_rows(2)[1:], Remembering()
    make_fit(module, rows, num_train_epochs=2, per_device_train_batch_size=1, past_index=1).train()
    sums = [float(row["tokens"].sum()) for row in rows]
    assert module.handed == [None, sums[0], sums[0] + sums[1]] * 2


def test_an_evaluation_leaves_what_is_handed_on_alone(make_fit: MakeFit) -> None:
    rows, module = token_rows(5)[1:], Remembering()
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    make_fit(module, rows, rows[2:], max_steps=4, per_device_train_batch_size=1, past_index=1, **options).train()
    sums = [float(row["tokens"].sum()) for row in rows]
    evaluation = [None, sums[2]]
    training = [None, sums[0], sums[0] + sums[1], sums[0] + sums[1] + sums[2]]
    assert module.handed == [*training[:2], *evaluation, *training[2:], *evaluation]


def test_compute_loss_may_return_the_outputs_too(make_fit: MakeFit) -> None:
    rows = token_rows(5)[1:]
    fit = make_fit(Tagger(), rows, max_steps=1)
    fit.train()
    batch = collate(rows)
    loss, outputs = fit.compute_loss(fit.strategy.model, batch, return_outputs=True)
    torch.testing.assert_close(outputs, fit.module(batch["tokens"]))
    expected = nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fit.compute_loss(fit.strategy.model, batch), expected)


def test_the_first_layer_that_overflows_is_named(make_fit: MakeFit) -> None:
    class Overflowing(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x * 1e38) * 1e38)

    with pytest.raises(FloatingPointError, match=r"In update 1, the .*'head' \(Linear\)") as caught:
        make_fit(Overflowing(), regression_rows(4), max_steps=2, debug="underflow_overflow").train()
    assert "hidden (Linear)" in str(caught.value)


def test_a_bad_weight_is_named_with_the_last_frames_before_it(make_fit: MakeFit) -> None:
    class Chain(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x))

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return nn.functional.mse_loss(outputs, batch["y"])

    class Spoils(Callback):
        """Between the second and the third update."""

        def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    context["fit"].module.layers[27].bias[1] = math.nan

    fit = make_fit(Chain(), regression_rows(8), max_steps=5, debug="underflow_overflow", callbacks=[Spoils()])
    with pytest.raises(FloatingPointError) as caught:
        fit.train()
    first, *frames = str(caught.value).splitlines()
    assert first.startswith("In update 3, the output and the weight bias of 'layers.27' (Linear) overflowed")
    # 21 layers in the order of forward, the bad one last.
    layers = [line.split()[0] for line in frames if line.endswith("(Linear)")]
    assert layers == [f"layers.{i}" for i in range(7, 28)]
    assert not any(layer._forward_hooks for layer in fit.module.modules())


def nan_on(updates: set[int]) -> type[Regressor]:
    """A Regressor whose loss is NaN in some updates (from 0), without touching its parameters."""

    class Failing(Regressor):
        calls = 0

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            bad = self.calls in updates
            type(self).calls += 1
            return outputs.mean() * 0.0 + (math.nan if bad else float(self.calls))

    return Failing


@pytest.mark.parametrize("filters", [True, False])
def test_losses_that_are_not_finite(filters: bool, make_fit: MakeFit) -> None:
    fit = make_fit(
        nan_on({0, 4})(),
        regression_rows(6),
        max_steps=6,
        per_device_train_batch_size=1,
        logging_steps=3,
        logging_nan_inf_filter=filters,
        learning_rate=0.0,
    )
    fit.train()
    first, second = logs_of(fit)
    if filters:  # updates 1 and 2 log 2.0 and 3.0; updates 3 and 5 log 4.0 and 6.0
        assert (first["loss"], first["nonfinite_losses"]) == (2.5, 1)
        assert (second["loss"], second["nonfinite_losses"]) == (5.0, 1)
    else:
        assert math.isnan(first["loss"]) and math.isnan(second["loss"])


def test_classes_are_seven() -> None:
    assert CLASSES == 7


def test_ignore_data_skip_begins_the_epoch_anew(make_fit: MakeFit) -> None:
    class Noting(Regressor):
        seen: list[float] = []

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            self.seen.append(batch["x"][0, 0].item())
            return super().loss(outputs, batch)

    rows = regression_rows(6)
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
    fit = make_fit(Noting(), rows, max_steps=2, **options)
    fit.train()
    for skips, expected in ((True, rows[0]), (False, rows[2])):
        Noting.seen.clear()
        again = make_fit(Noting(), rows, max_steps=3, ignore_data_skip=skips, **options)
        again.train(resume_from_checkpoint=f"{fit.args.output_dir}/checkpoint-2")
        assert Noting.seen == [expected["x"][0].item()]
