"""What is logged is a mean over what was added, on all processes that take part."""

from __future__ import annotations

import pytest

from sparsekv.training.meter import Meter


def test_means_over_processes_are_those_of_all_that_was_added():
    """Sums over counts, not means of means; what only one process measured counts too."""
    here, there = Meter(), Meter()
    here.add({"ce": 6.0}, {"ce": 3})
    here.add_mean("ratio", 0.5)
    here.add_tokens(10)
    there.add({"ce": 14.0, "kl": 3.0}, {"ce": 1, "kl": 2})
    there.add_mean("ratio", 0.7)
    there.add_mean("ratio", 0.9)
    there.add_tokens(30)
    other: list = []
    there.read(lambda heard: other.extend(heard) or heard)
    found = here.read(lambda heard: heard + other)
    assert found.pop("tokens_per_s") > 0
    assert found == {"ce": pytest.approx(20 / 4), "ratio": pytest.approx(0.7), "kl": pytest.approx(1.5)}
    assert here.read() == there.read() == {}, "then everything starts anew"


def test_a_meter_alone():
    meter = Meter()
    meter.add({"ce": 6.0, "none": 0.0}, {"ce": 3, "none": 0})
    assert meter.read() == {"ce": 2.0}
