"""Memory maps of compiled programs, and getting rid of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from quota_jax import programs
from quota_jax.programs import (
    many_programs,
    memory_maps,
    release_many_programs,
    release_programs,
)


@pytest.fixture
def compiled():
    """Twenty programs, held by JAX alone."""
    release_programs()
    before = memory_maps()
    if not before:
        pytest.skip("this system does not tell memory maps")
    for size in range(1, 21):
        jax.jit(lambda x: jnp.sin(x) @ x.T + x.sum())(jnp.ones((size, size)))
    return before


def test_programs_hold_maps_until_they_are_released(compiled):
    held = memory_maps()
    assert held > compiled + 20
    release_many_programs()
    assert memory_maps() > compiled + 20, "20 programs are not many"
    release_programs()
    assert memory_maps() < held - 20


def test_many_is_a_share_of_what_the_system_allows(monkeypatch, compiled):
    held = memory_maps()
    monkeypatch.setattr(programs, "_most_maps", lambda: 4 * held)
    assert not many_programs()
    monkeypatch.setattr(programs, "_most_maps", lambda: 2 * held)
    assert many_programs()
    release_many_programs()
    assert memory_maps() < held - 20


def test_a_system_that_tells_nothing_never_has_many(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert memory_maps() == 0
    assert not many_programs()
