"""Updates as one CUDA graph on a real GPU. No GPU has run these yet; where there is none they are skipped."""

from typing import Any

import pytest
import torch
from stratagem import TrainModule
from tiny import MakeFit, Regressor, parameters_of, regression_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
    pytest.mark.slow,
]


class Network(Regressor):
    """Under AdamW."""

    configure_optimizer = TrainModule.configure_optimizer


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_program_on_the_gpu_has_the_numbers_of_the_usual_way(make_fit: MakeFit, mode: str) -> None:
    found = []
    for compiled in ({}, {"torch_compile": "update", "torch_compile_mode": mode}):
        torch.manual_seed(3)
        arguments: dict[str, Any] = {"max_steps": 40, "learning_rate": 0.01, "max_grad_norm": 1.0, "strategy": "single"}
        fit = make_fit(Network(), regression_rows(42), lr_scheduler_type="linear", **arguments, **compiled)
        fit.train()
        found.append(parameters_of(fit.module))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
