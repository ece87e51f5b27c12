"""kvpress methods as policies: by name, or from a press that somebody built.

    make_press_policy("adakv(snapkv)", window_size=32)
    from_press(kvpress.SnapKVPress(window_size=32))

Names, routes and costs stand in `press_table`; how each route works, in `press_routes`. Loads kvpress and
torch only when a policy is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from numbers import Integral, Real
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies import press_table
from sparsekv.policies.method_info import MethodInfo
from sparsekv.policies.press_table import OURS, PressSpec, press_class

if TYPE_CHECKING:
    from kvpress import BasePress

    from sparsekv.policies.base import Policy

KVPRESS_METHODS: MappingProxyType[str, MethodInfo] = MappingProxyType(
    {info.name: info for info in press_table.press_info()}
)
"""Method name -> what a user is told about it. `random`, `full` and their kin are sparsekv's own, not
here."""

RouteChoice = Literal["auto", "native"]


def make_press_policy(name: str, **args: Any) -> Policy:
    """The policy of a kvpress method.

    Parameters
    ----------
    name : str
        A name of kvpress's evaluation registry ("adakv_snapkv"), "wrapper(inner)" ("chunkkv(tova)"), or a
        class name ("KnormPress").
    **args
        Constructor arguments of the press; one that the outer press does not have goes to the press inside
        it. The compression ratio is not among them: it is the budget's. `seed` fixes what presses draw.

    Raises
    ------
    ConfigError
        For an unknown name or argument (with the nearest one), or a value that kvpress refuses.
    """
    spec = parse_method(name)
    if spec is None:
        raise unknown("method", name, [*KVPRESS_METHODS, *press_table.wrapper_names()])
    left = dict(args)
    press = _build(spec, left, name)
    seed = left.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"method {name}: seed must be a whole number, got {seed!r}")
    if left:
        raise unknown(f"argument of method {name}", next(iter(left)), _arguments(spec))
    return from_press(press, name=name, seed=seed)


# ---- names
# ----------------------------------------------------------------------------------------------------


def parse_method(name: str, inside: bool = False) -> PressSpec | None:
    """The press that a method name stands for; None if there is none.

    Inside brackets names are press classes, because wrappers take presses: see `press_table`.
    """
    name = name.strip()
    head, bracket, rest = name.partition("(")
    if bracket:
        if not rest.endswith(")"):
            raise ConfigError(
                f"method {name!r}: brackets do not match; write wrapper(inner), e.g. adakv(snapkv)"
            )
        return _parse_wrapper(head.strip(), rest[:-1], name)
    if not inside and (name in press_table.METHODS or name == "h2o"):
        return press_table.METHODS.get(name, PressSpec("ObservedAttentionPress"))
    row = press_class(name)
    if inside and name in press_table.METHODS and (row is None or row.inner):
        return press_table.METHODS[name]
    if row is None:
        return None
    if row.inner and row.cls != "LUKVPress":
        inner = "snapkv,decoding_knorm" if "," in row.inner else "snapkv"
        raise ConfigError(f"method {row.name} wraps another: write {row.name}({inner})")
    return PressSpec(row.cls)


def _parse_wrapper(head: str, body: str, whole: str) -> PressSpec:
    row = press_class(head)
    if row is None or not row.inner:
        raise unknown("wrapper", head, press_table.wrapper_names())
    inner = []
    for part in _split(body):
        spec = parse_method(part, inside=True)
        if spec is None:
            raise unknown(f"method inside {row.name}(...)", part, press_table.class_names())
        inner.append(spec)
    fields = row.inner.split(",")
    if row.inner != "presses" and len(inner) != len(fields):
        raise ConfigError(
            f"method {whole!r}: {row.name} takes {len(fields)} inner method(s), got {len(inner)}"
        )
    if row.cls in ("CriticalKVPress", "CriticalAdaKVPress") and inner[0].cls == "ExpectedAttentionPress":
        # as in kvpress's registry: the wrapper weighs by value norms itself
        inner[0] = replace(inner[0], args={"use_vnorm": False, **inner[0].args})
    return PressSpec(row.cls, {}, tuple(inner))


def _split(body: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(body):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append(body[start:i])
            start = i + 1
    return [*parts, body[start:]]


# ---- building
# -------------------------------------------------------------------------------------------------


def _class(name: str) -> Any:
    import kvpress

    if name == "ObservedAttentionPress":
        from sparsekv.policies.as_press import H2OPress

        return H2OPress
    return getattr(kvpress, name)


def _parameters(cls: Any, inner: str) -> list[str]:
    names = inspect.signature(cls).parameters
    hidden = {*inner.split(","), "compression_ratio", "seed"}
    return [name for name in names if name not in hidden]


def _arguments(spec: PressSpec) -> list[str]:
    """All arguments that a method takes, outermost press first."""
    row = press_class(spec.cls)
    own = _parameters(_class(spec.cls), row.inner if row else "")
    return list(dict.fromkeys([*own, *(name for part in spec.inner for name in _arguments(part)), "seed"]))


def _build(spec: PressSpec, args: dict[str, Any], name: str) -> BasePress:
    """The press of a spec; takes what it uses out of `args`, outer presses first."""
    if "compression_ratio" in args:
        raise ConfigError(
            f"method {name}: compression_ratio is not an argument of a method; give it as the budget"
        )
    cls, row = _class(spec.cls), press_class(spec.cls)
    inner_field = row.inner if row else ""
    given = dict(spec.args)
    given.update({key: args.pop(key) for key in _parameters(cls, inner_field) if key in args})
    parameters = inspect.signature(cls).parameters
    for key, value in given.items():
        _check_argument(name, value, parameters[key])
    inner = [_build(part, args, name) for part in spec.inner]
    if inner_field == "presses":
        given["presses"] = inner
    elif inner:
        given.update(zip(inner_field.split(","), inner, strict=True))
    try:
        press: BasePress = cls(**given)
    except (AssertionError, ValueError, TypeError) as error:
        told = (str(error) or "a value is not allowed").strip().splitlines()[0]
        raise ConfigError(f"method {name}: {told}") from error
    return press


_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": (
        "a whole number >= 0",
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and int(v) >= 0,
    ),
    "float": ("a number", lambda v: isinstance(v, Real) and not isinstance(v, bool) and not isnan(float(v))),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a text", lambda v: isinstance(v, str)),
}
"""Annotation of a press's argument -> what is allowed, in words, and the test. No count of a press may be negative."""


def _check_argument(method: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise a ConfigError for a value that its annotation excludes, which kvpress itself doesn't look at.

    The default is never wrong, whatever its annotation says.
    """
    field, annotation = parameter.name, parameter.annotation
    if value is parameter.default:
        return
    kinds = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        if value not in kinds:
            raise unknown(f"{field} of method {method}", value, map(str, kinds))
        return
    names = [kind if isinstance(kind, str) else getattr(kind, "__name__", "") for kind in kinds]
    allowed = [_ALLOWED[name] for name in names if name in _ALLOWED]
    if get_origin(annotation) not in (None, Union, UnionType) or len(allowed) + ("NoneType" in names) < len(
        names
    ):
        return  # a list, a tensor, another press
    if not any(fits(value) for _, fits in allowed) and not (value is None and "NoneType" in names):
        words = " or ".join(said for said, _ in allowed)
        raise ConfigError(f"method {method}: {field} must be {words}, got {value!r}")


# ---- from a press
# -----------------------------------------------------------------------------------------------


def from_press(
    press: BasePress, *, name: str | None = None, seed: int = 0, route: RouteChoice = "auto"
) -> Policy:
    """The policy of any kvpress press, its own or a user's class.

    Parameters
    ----------
    press : kvpress BasePress
        Copied, never changed. If it has a compression ratio of its own, the budget must be empty.
    name : str, optional
        What messages and results call it; by default its class name.
    seed : int
        For presses that draw.
    route : "auto" or "native"
        "native" runs kvpress's own hooks whatever the press does.

    Returns
    -------
    Policy
        `H2O` for observed attention, else one of `press_routes`'s: scores if the press is only scores; masked
        for the head-wise presses; native for presses known to change entries or to work while decoding, and
        for unknown ones with hooks of their own. Anything else is asked for its `compress`, and the rows it
        leaves are compared: a ConfigError says so if it changed them.
    """
    from kvpress import BasePress, KeyRerotationPress

    from sparsekv.policies import press_classify as kinds
    from sparsekv.policies.as_press import H2OPress, PolicyPress
    from sparsekv.policies.press_model import PressModel, PressNative
    from sparsekv.policies.press_routes import PressScores

    if not isinstance(press, BasePress):
        raise ConfigError(f"from_press takes a kvpress press, got {type(press).__name__}")
    label = name or type(press).__name__
    if route == "native":
        return PressNative(press, label, kinds.works_while_decoding(press))
    if isinstance(press, PolicyPress):
        return press.policy
    press = kinds.without_eager(press, H2OPress)
    rerotate = isinstance(press, KeyRerotationPress)
    if isinstance(press, KeyRerotationPress):
        press = press.press
    kind = kinds.classify(press, forced_scorer=rerotate)
    if kind is PressScores and isinstance(press, H2OPress) and not rerotate and not press.compression_ratio:
        from sparsekv.policies.attention_scores import H2O

        return H2O(block_size=press.block_size)
    if issubclass(kind, PressNative):
        return kind(press, label, kinds.works_while_decoding(press))
    if issubclass(kind, PressModel):
        return kind(press, label)
    return kind(press, label, seed=seed, rerotate=rerotate, ratio_free=kinds.scores_ignore_ratio(press))


__all__ = ["KVPRESS_METHODS", "OURS", "from_press", "make_press_policy", "parse_method"]
