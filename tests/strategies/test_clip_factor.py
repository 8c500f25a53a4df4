"""The factor that clips gradients is the one of torch's formula, to the bit."""

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from stratagem.strategies.clip_factor import clip_factor

norms = st.floats(0.0, width=32) | st.just(math.nan)


@given(norm=norms, max_norm=st.floats(1e-30, 1e30), double=st.booleans())
@example(norm=1.0, max_norm=1.0, double=False)
@example(norm=math.inf, max_norm=1.0, double=False)
@example(norm=math.inf, max_norm=math.inf, double=False)
@example(norm=0.0, max_norm=1e300, double=False)
@example(norm=0.9999990463256836, max_norm=1.0, double=False)
def test_it_is_torchs_to_the_bit(norm: float, max_norm: float, double: bool) -> None:
    tensor = torch.tensor(norm, dtype=torch.float64 if double else torch.float32)
    expected = (max_norm / (tensor + 1e-6)).clamp(max=1.0).item()
    found = clip_factor(tensor, max_norm)
    assert found == expected or (math.isnan(found) and math.isnan(expected))
