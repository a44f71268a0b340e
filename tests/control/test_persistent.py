"""The two persistent collections against the plain ones they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.control.persistent import Ranks, Vec


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), sets=st.lists(st.tuples(st.integers(0, 2999), st.integers()), max_size=40))
def test_vec_is_a_list_whose_older_versions_stay(size, sets):
    vec, plain, history = Vec.filled(size, 0), [0] * size, []
    for index, value in sets:
        history.append((vec, list(plain)))
        if index < size:
            vec = vec.set(index, value)
            plain[index] = value
    assert list(vec) == plain
    assert all(list(old) == was for old, was in history)


def test_vec_compares_by_value_and_knows_its_bounds():
    assert Vec.filled(40, 1).set(33, 2).set(33, 1) == Vec.filled(40, 1)
    assert Vec.filled(40, 1) != Vec.filled(41, 1)
    assert len(Vec.filled(0, None)) == 0
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            Vec.filled(40, 1)[wrong]
        with pytest.raises(IndexError):
            Vec.filled(40, 1).set(wrong, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 200)))
def test_ranks_is_a_set(ranks):
    some = Ranks()
    for rank in ranks:
        some = some.add(rank)
    assert some.count == len(set(ranks))
    assert some.missing(201) == tuple(sorted(set(range(201)) - set(ranks)))
    assert all(rank in some for rank in ranks)
