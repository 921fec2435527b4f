import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernels.quantile import neighbours

CONFIDENCE = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, -0.0, 0.25, 1.0, float("nan")]))
PARTS = st.lists(arrays(np.float32, st.integers(0, 40), elements=CONFIDENCE), max_size=5)


@given(PARTS, st.floats(0, 1))
def test_it_is_numpys_quantile_of_all_parts_together(parts: list[np.ndarray], share: float) -> None:
    found = neighbours(lambda: iter(parts), share)
    values = np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float64)
    known = values[~np.isnan(values)]
    if not len(known):
        assert found is None
        return
    assert found is not None
    low, high = (np.quantile(known, share, method=method) for method in ("lower", "higher"))
    assert (found.low, found.high) == (low, high)
    assert np.isclose(found.low + (found.high - found.low) * found.way, np.quantile(known, share), rtol=1e-12)


def test_values_that_differ_in_their_last_bit_are_told_apart() -> None:
    first = np.float32(0.3)
    values = [first]
    for _ in range(4):
        values.append(np.nextafter(values[-1], np.float32(1)))
    for rank, value in enumerate(values):
        found = neighbours(lambda: [np.array(values[::-1])], rank / 4)
        assert found == (float(value), float(value), 0.0)
