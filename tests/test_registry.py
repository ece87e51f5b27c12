"""Registry and the wording of errors about names."""

from __future__ import annotations

import pytest

from sparsekv.errors import ConfigError, SparseKVError, nearest, unknown
from sparsekv.registry import Registry


def methods() -> Registry[int]:
    registry: Registry[int] = Registry("method")
    registry.register("full", 1, aliases=("no_press",))
    registry.register("snapkv", 2)
    return registry


def test_unknown_names_field_value_allowed_and_nearest():
    error = unknown("method", "snapvk", ["full", "snapkv"])
    assert str(error) == "unknown method 'snapvk' (did you mean 'snapkv'?); allowed: full, snapkv"
    assert isinstance(error, ValueError) and isinstance(error, SparseKVError)


def test_unknown_without_anything_near_gives_no_hint():
    assert str(unknown("task", "zzz", ["vt", "cwe"])) == "unknown task 'zzz'; allowed: vt, cwe"
    assert str(unknown("task", 3, [])) == "unknown task '3'; allowed: none"


@pytest.mark.parametrize(
    ("value", "name"),
    [("SnapKV", "snapkv"), ("sink-recent", "sink_recent"), ("limt", "limit"), ("qqqq", None)],
)
def test_nearest_ignores_case_and_dashes(value, name):
    assert nearest(value, ["snapkv", "sink_recent", "limit"]) == name


def test_get_by_name_and_alias_and_names_without_aliases():
    registry = methods()
    assert registry.get("no_press") == registry.get("full") == 1
    assert registry.names() == list(registry) == ["full", "snapkv"]
    assert "no_press" in registry and "h2o" not in registry and len(registry) == 2
    assert registry.resolve("no_press") == "full" and registry.aliases("full") == ["no_press"]


def test_get_of_an_unknown_name_says_what_there_is():
    with pytest.raises(
        ConfigError, match=r"^unknown method 'snapv' \(did you mean 'snapkv'\?\); allowed: full, snapkv$"
    ):
        methods().get("snapv")


def test_decorator_returns_what_it_decorates():
    registry: Registry[type] = Registry("policy")

    @registry.register("mine", aliases=("ours",))
    class Mine:
        pass

    assert registry.get("ours") is Mine


def test_decorator_of_a_function_keeps_it_callable():
    registry: Registry = Registry("metric")

    @registry.register("one")
    def one() -> int:
        return 1

    assert one() == registry.get("one")() == 1


@pytest.mark.parametrize(
    ("name", "aliases"), [("full", ()), ("no_press", ()), ("new", ("snapkv",)), ("new", ("new",))]
)
def test_a_taken_name_is_refused_and_changes_nothing(name, aliases):
    registry = methods()
    with pytest.raises(ValueError, match="registered twice"):
        registry.register(name, 3, aliases=aliases)
    assert registry.names() == ["full", "snapkv"] and registry.get("snapkv") == 2 and "new" not in registry
