"""`sparsekv generate`: one question about one file, under one method, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekv.errors import ConfigError


def generate(
    file: Annotated[Path, typer.Option("--file", help="The text that is asked about (UTF-8).")],
    question: Annotated[str, typer.Option("--question", help="The question.")],
    model: Annotated[
        str, typer.Option("--model", help="A Hub id, a folder, or a name of `sparsekv ls models`.")
    ] = "smollm2",
    adapter: Annotated[str | None, typer.Option("--adapter", help="Folder of a LoRA adapter.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="A name of `sparsekv ls methods`, or wrapper(inner); snapkv by default."
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", help="compression_ratio: the fraction removed, in [0, 1); 0.5 for the default method."
        ),
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option("--budget-tokens", help="Entries to keep per kv head, instead of a ratio."),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", help="Read that many tokens at a time and evict in between."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.")] = 128,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Let eviction see the question.")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the text if it is longer than the model allows.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, …")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of random methods.")] = 0,
) -> None:
    """Answer a question about a file, and say what the answer cost beside the full cache."""
    if ratio is not None and budget_tokens is not None:
        raise ConfigError(f"--ratio {ratio} and --budget-tokens {budget_tokens} are both given; give one")
    if ratio is not None and not 0 <= ratio < 1:
        raise ConfigError(f"--ratio must be in [0, 1) (the fraction removed), got {ratio}")
    counts = {"--budget-tokens": budget_tokens, "--chunk": chunk, "--max-new-tokens": max_new_tokens}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{option} must be at least 1 token, got {count}")
    if not question.strip():
        raise ConfigError("--question is empty")

    from sparsekv.benchmarks.data import is_text, read_text

    if not is_text(question):
        raise ConfigError("--question is not valid UTF-8 text")
    text = read_text(file, "--file")

    from sparsekv.cli.quiet import quieten

    quieten()
    from sparsekv.evaluation.advice import OPTIONS
    from sparsekv.evaluation.ask import ask
    from sparsekv.policies.budget import Budget

    if method is None:
        method = "snapkv"
        ratio = 0.5 if ratio is None and budget_tokens is None else ratio
    report = ask(
        text,
        question,
        model=model,
        method=method,
        budget=Budget(ratio, budget_tokens),
        adapter=adapter,
        chunk=chunk,
        query_aware=query_aware,
        truncate=truncate,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        seed=seed,
        advice=OPTIONS,
    )
    typer.echo(report.answer.strip())
    typer.echo("")
    for line in report.lines():
        typer.echo(line)
