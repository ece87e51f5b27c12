"""What a config asks for, with everything checked that needs no weights: methods, data, lengths, budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.architecture import max_context
from sparsekv.benchmarks import BENCHMARKS
from sparsekv.benchmarks.base import Example
from sparsekv.config import EvalConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.advice import CONFIG, Advice
from sparsekv.evaluation.cells import UNCOMPRESSED, Cell, Setting, Task, own_phase, settings
from sparsekv.evaluation.prompts import Prompt, assemble
from sparsekv.models import load_tokenizer
from sparsekv.models.load import load_config
from sparsekv.models.locate import check_adapter_folder, locate_model
from sparsekv.models.placement import named_device
from sparsekv.policies.base import LayerPolicy, ModelPolicy, NativePolicy, Policy, TokenContext, TokenPolicy
from sparsekv.policies.budget import Budget
from sparsekv.policies.soft import SoftThreshold
from sparsekv.relevance import RELEVANCE_FILE
from sparsekv.relevance.policy import Relevance


@dataclass(frozen=True)
class Plan:
    """A checked run: every task's prompts × every setting.

    Parameters
    ----------
    prompts : task -> its prompts, in row order
    settings : methods × budgets
    longest : tokens the model can read (its `max_position_embeddings`)
    """

    prompts: dict[Task, list[Prompt]]
    settings: list[Setting]
    longest: int

    @property
    def cells(self) -> list[Cell]:
        """Every task in every setting."""
        return [Cell(task, setting) for task in self.prompts for setting in self.settings]

    @property
    def n_rows(self) -> int:
        """Predictions in all."""
        return sum(len(rows) for rows in self.prompts.values()) * len(self.settings)


def make_plan(config: EvalConfig, prompts: dict[Task, list[Prompt]] | None = None) -> Plan:
    """Check a config against methods, data, tokenizer and model config; no weights are loaded.

    Parameters
    ----------
    prompts : those of another plan of the same benchmarks and model, to save making them again

    Raises
    ------
    ConfigError
        An unknown method or task, a missing or malformed data file, a context longer than the model allows,
        a budget that a method can't meet, the same task twice, no such adapter.
    """
    chosen = settings(config)
    check_combinations(chosen)
    if config.device != "auto":
        named_device(config.device)
    if config.adapter is not None:
        check_adapter_folder(config.adapter)
        locate_model(config.model, config.adapter)
    check_predictors(config, chosen)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    longest = max_context(model_config)
    if prompts is None:
        prompts = load_prompts(config, tokenizer, longest)
    try_budgets(chosen, prompts, model_config, tokenizer, longest)
    return Plan(prompts, chosen, longest)


def load_prompts(config: EvalConfig, tokenizer: Any, longest: int) -> dict[Task, list[Prompt]]:
    """Every task's rows as token ids, each of at most `longest` tokens unless it is read in chunks."""
    return {
        task: [
            assemble(
                example,
                tokenizer,
                query_aware=config.query_aware,
                max_tokens=None if config.chunk is not None else longest,
                truncate=truncate,
                max_new_tokens=config.max_new_tokens,
            )
            for example in examples
        ]
        for task, examples, truncate in load_examples(config, tokenizer)
    }


def check_predictors(config: EvalConfig, chosen: Sequence[Setting]) -> None:
    """Raise a ConfigError if a method needs relevance predictors and neither adapter nor model has them."""
    asking = [s.method for s in chosen if needs_predictors(s.policy())]
    if not asking:
        return
    source = locate_model(config.model, config.adapter)
    folders = [Path(folder) for folder in (source.adapter, source.path) if folder is not None]
    if any((folder / RELEVANCE_FILE).is_file() for folder in folders):
        return
    where = " or ".join(f"'{folder.name}'" for folder in folders)
    raise ConfigError(
        f"method '{asking[0]}' needs relevance predictors: no {RELEVANCE_FILE} in {where}; give an adapter or a model "
        "folder that has one"
    )


def needs_predictors(policy: Policy) -> bool:
    """Whether a policy scores by the model's relevance predictors."""
    return isinstance(policy, Relevance) or (isinstance(policy, SoftThreshold) and policy.on == "relevance")


def load_examples(config: EvalConfig, tokenizer: Any) -> list[tuple[Task, list[Example], bool]]:
    """(task, examples, may be truncated) for every task of every benchmark, in the config's order."""
    found: dict[Task, tuple[list[Example], bool]] = {}
    for spec in config.benchmarks:
        if config.limit is not None:
            spec = spec.model_copy(update={"rows": min(spec.rows or config.limit, config.limit)})
        groups: dict[Task, list[Example]] = {}
        for example in BENCHMARKS.get(spec.name).load(spec, tokenizer, config.seed):
            task = Task(example.benchmark, example.task, example.context_length)
            groups.setdefault(task, []).append(example)
        for task, examples in groups.items():
            if task in found:
                raise ConfigError(
                    f"task {task} is listed twice in benchmarks; give each variant its own output_dir"
                )
            found[task] = examples[: config.limit], spec.truncate or config.truncate
    if not found:
        raise ConfigError("the benchmarks hold no examples")
    ids = [example.example_id for examples, _ in found.values() for example in examples]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"two examples have the id '{twice}'")
    return [(task, examples, truncate) for task, (examples, truncate) in found.items()]


def check_combinations(chosen: Sequence[Setting], advice: Advice = CONFIG) -> None:
    """Raise a ConfigError for a phase, chunk or missing budget that a method can't take."""
    for setting in chosen:
        policy = setting.policy()
        name = f"method '{setting.method}'"
        own = own_phase(policy)
        if own is not None and setting.phase != own:
            raise ConfigError(
                f"{name} evicts by itself, in phase {own}; use phase: {own} or prefill, not {setting.phase}"
            )
        if own is None and setting.phase != "prefill" and not isinstance(policy, (TokenPolicy, LayerPolicy)):
            raise ConfigError(f"{name} can't evict while decoding; use phase: prefill")
        if setting.chunk is not None and policy.own_prefill:
            raise ConfigError(
                f"{name} reads the whole context at once, so it can't be read in chunks; {advice.no_chunk}"
            )
        scope = setting.budget_scope
        if policy.by_step and setting.phase != "prefill":
            raise ConfigError(f"{name} evicts nothing while decoding; use phase: prefill")
        if scope != "head" and isinstance(policy, (ModelPolicy, NativePolicy)):
            raise ConfigError(
                f"{name} shares its budget in its own way; budget_scope must be head, got {scope}"
            )
        if isinstance(policy, LayerPolicy):
            if scope == "model" and not policy.scored:
                raise ConfigError(
                    f"{name} decides layer by layer; budget_scope must be head or layer, got model"
                )
            if scope not in policy.scopes:
                raise ConfigError(
                    f"{name} shares its budget in its own way; budget_scope must be "
                    f"{' or '.join(policy.scopes)}, got {scope}"
                )
            what = name if policy.evicts_once(Budget()) else f"{name}: budget_scope {scope}"
            if policy.needs_whole_context(setting.budget) and (
                setting.chunk is not None or setting.phase != "prefill"
            ):
                raise ConfigError(f"{what} needs the whole context at once: no chunk, phase prefill")
            if policy.evicts_once(setting.budget) and setting.phase != "prefill":
                raise ConfigError(f"{what} evicts once: phase prefill")
        if setting.tier is not None:
            _check_tier(setting, policy, advice)
        policy.check_budget(setting.budget)
        if isinstance(policy, NativePolicy):
            policy.press(setting.budget)
        elif (
            isinstance(policy, LayerPolicy)
            and (policy.scored or policy.needs_budget)
            and not policy.own_sizes
            and not setting.budget.given
        ):
            raise ConfigError(f"{name} needs a budget; give {advice.budget}")


def _check_tier(setting: Setting, policy: Policy, advice: Advice) -> None:
    """Raise a ConfigError for a method whose evicted entries can't be kept in a passive tier."""
    name = f"method '{setting.method}'"
    why = policy.why_one_tier
    if setting.method == UNCOMPRESSED:
        why = "evicts nothing"
    elif isinstance(policy, NativePolicy):
        why = "runs only by kvpress's own hooks, in a cache of one tier"
    if why is not None:
        raise ConfigError(f"{name} {why}; remove passive")
    if setting.phase != "prefill":
        raise ConfigError(
            f"{name} with a passive tier evicts once, and the active tier keeps its size by itself; use phase: prefill"
        )
    if not setting.budget.given:
        raise ConfigError(f"{name} needs a budget, the size of its active tier; give {advice.budget}")


def try_budgets(
    chosen: Sequence[Setting],
    prompts: dict[Task, list[Prompt]],
    model_config: Any,
    tokenizer: Any,
    longest: int,
    advice: Advice = CONFIG,
) -> None:
    """Run every token policy on the shortest context of every task: budgets under the sink size show here.

    So do contexts that are no longer than a method's window.
    """
    for task, rows in prompts.items():
        shortest = min(rows, key=lambda prompt: prompt.context_tokens)
        context = TokenContext.of_model(model_config, shortest.context_ids, tokenizer=tokenizer, seeds=(0,))
        too_long = max(prompt.total_tokens for prompt in rows)
        for setting in chosen:
            if too_long > longest and setting.method == UNCOMPRESSED:
                raise ConfigError(
                    f"{advice.task.format(task)} has {too_long} tokens, the model allows {longest}: method "
                    f"'full' keeps all of them, so it can't read them in chunks; {advice.full_in_chunks}"
                )
            if too_long > longest and setting.tier is not None:
                raise ConfigError(
                    f"{advice.task.format(task)} has {too_long} tokens, the model allows {longest}: keys are "
                    f"re-rotated beyond that, which a passive tier can't; remove passive of method '{setting.method}'"
                )
            policy = setting.policy()
            if isinstance(policy, TokenPolicy):
                policy.select(context, setting.budget)
            elif isinstance(policy, LayerPolicy):
                _check_window(setting, policy, shortest, advice)


def _check_window(setting: Setting, policy: LayerPolicy, shortest: Prompt, advice: Advice) -> None:
    """Raise a ConfigError for a context that a method has to evict from and can't score."""
    n = shortest.context_tokens
    evicts = setting.phase != "decode" and setting.budget.given and setting.budget.n_kept(n) < n
    if evicts and n <= policy.too_short:
        example = advice.example.format(shortest.example.example_id)
        raise ConfigError(f"{policy.too_short_for(f'{example} has {n} tokens')}; {advice.shorter_window}")
