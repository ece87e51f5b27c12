"""Which policies a training step can evict by: those that choose before the forward, or inside each of its layers."""

from __future__ import annotations

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerPolicy, Policy, TokenPolicy
from sparsekv.policies.budget import Budget, Scope


def why_untrainable(policy: Policy, scope: Scope = "head") -> str | None:
    """Why a training step can't evict as a policy does under a ratio of that scope; None if it can.

    Continues "method NAME ...". A policy that draws one of several is judged by each of them.
    """
    parts: tuple[Policy, ...] = getattr(policy, "policies", ())
    if parts:
        return next((reason for one in parts if (reason := why_untrainable(one, scope))), None)
    if policy.by_step:
        return "chooses at every decoding step, and a training step has none"
    if policy.rerotate:
        return "re-rotates the keys that stay, and a training step only hides the others"
    if isinstance(policy, TokenPolicy):
        return None
    if not isinstance(policy, LayerPolicy):
        return "needs a prefill of its own, or changes more than which entries stay"
    if policy.spans_layers(Budget(compression_ratio=0.5, scope=scope)):
        return "needs every layer's scores first, and a training step has each layer choose as it runs" + (
            "; give scope 'head' or 'layer'" if scope == "model" else ""
        )
    return None


def trainable(policy: Policy, scope: Scope = "head") -> TokenPolicy | LayerPolicy:
    """`policy`, if a training step can evict by it.

    Raises
    ------
    ConfigError
        Otherwise; it says why.
    """
    check_trainable(policy, scope)
    if not isinstance(policy, (TokenPolicy, LayerPolicy)):
        raise ConfigError(f"method {policy.name} decides nothing itself; ask `draw` for the policy of a step")
    return policy


def check_trainable(policy: Policy, scope: Scope = "head") -> None:
    """Raise a ConfigError unless a training step can evict by a policy, or by every one that it may draw."""
    reason = why_untrainable(policy, scope)
    if reason is not None:
        name = policy.name or type(policy).__name__
        raise ConfigError(f"method {name} {reason}; it can't be trained under")
