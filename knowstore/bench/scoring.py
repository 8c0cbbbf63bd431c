"""How the answers of a bench are scored: EM and F1 with bootstrap 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence

from knowstore.evaluation import bootstrap_interval, exact_match, token_f1


def scored(texts: Sequence[str], accepted: Sequence[Sequence[str]], seed: int) -> dict[str, object]:
    """{n, em, em_ci, f1, f1_ci} of answers, each with its accepted ones; scores from 0 to 1."""
    em = [exact_match(text, answers) for text, answers in zip(texts, accepted, strict=True)]
    f1 = [token_f1(text, answers) for text, answers in zip(texts, accepted, strict=True)]
    return {"n": len(em)} | share("em", em, seed) | share("f1", f1, seed)


def share(name: str, values: Sequence[float], seed: int) -> dict[str, object]:
    """Their mean under `name`, its bootstrap 95 % interval under `name_ci`; None for no values."""
    if not values:
        return {name: None, f"{name}_ci": None}
    return {name: sum(values) / len(values), f"{name}_ci": bootstrap_interval(values, seed=seed)}
