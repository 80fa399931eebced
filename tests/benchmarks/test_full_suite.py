"""The acceptance of the full suite: each family's best rows stand for it, and nothing else does."""

import sys
from pathlib import Path
from typing import Any

import pytest

from swarmnode.sync_specs import parse_sync

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GOOD = {"allreduce": 1.6, "cocktail": 1.64, "diloco": 1.67, "sparseloco": 1.69}
RATIOS = {"cocktail": 81.0, "sparseloco": 1001.0}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _full_suite  # type: ignore[import-not-found]

    yield _full_suite
    del sys.modules["_full_suite"]


def row(
    method: str,
    loss: float,
    *,
    seed: int = 0,
    rate: float = 0.003,
    batch: int = 4,
    device: str = "cpu",
) -> Any:
    return {
        "method": method, "sync": str(parse_sync(method)), "seed": seed, "held_out": loss,
        "up_ratio": RATIOS.get(method.split(",")[0], 1.0), "text": ["a"], "text_bytes": 1,
        "plan": {"rate": rate, "batch": batch}, "device": device,
    }  # fmt: skip


def rows(seed: int = 0, **losses: float) -> list[Any]:
    return [row(name, loss, seed=seed) for name, loss in {**GOOD, **losses}.items()]


def broken(suite: Any, found: list[Any]) -> list[str]:
    return suite.broken_claims(suite.taken(suite.comparable(found, found[0])))  # type: ignore[no-any-return]


def test_presets_that_hold_what_was_asked_break_nothing(suite: Any) -> None:
    assert broken(suite, rows()) == []
    assert broken(suite, rows(cocktail=1.66)) == ["cocktail is within 0.05 of all-reduce"]


def test_a_tuned_row_at_another_rate_stands_for_its_preset(suite: Any, capsys: Any) -> None:
    found = [*rows(sparseloco=1.9), row("sparseloco,outer=sgd4", 1.68, rate=0.002)]
    assert broken(suite, found) == []
    suite.print_taken(suite.taken(found))
    assert "| sparseloco | `sparseloco,outer=sgd4` | 0.002 | 0 | 1.6800 | +0.0800 |" in (
        capsys.readouterr().out
    )


def test_all_reduce_is_taken_at_its_best_rate_too(suite: Any) -> None:
    found = [*rows(), row("allreduce", 1.5, rate=0.002)]
    assert "cocktail is within 0.05 of all-reduce" in broken(suite, found)


@pytest.mark.parametrize(
    "other",
    [
        row("sparseloco,every=15", 1.6),
        row("sparseloco,codec=topk128of4096/int2", 1.6),
        row("sparseloco", 1.6, batch=8),
        row("sparseloco", 1.6, device="cuda"),
        row("diloco,every=15", 1.5),
    ],
)
def test_another_codec_h_batch_or_device_stands_for_nothing(suite: Any, other: Any) -> None:
    lost = ["sparseloco is within 0.10 of all-reduce", "sparseloco is within 0.03 of diloco"]
    assert broken(suite, [*rows(sparseloco=1.9), other]) == lost


def test_what_is_best_must_have_all_seeds_that_the_others_have(suite: Any) -> None:
    found = [*rows(0), *rows(1), row("cocktail,every=2", 1.0, seed=1)]
    assert suite.taken(found)["cocktail"][1]["method"] == "cocktail"
    found.append(row("cocktail,every=2", 1.2, seed=0))
    assert suite.taken(found)["cocktail"][1]["method"] == "cocktail,every=2"


def test_without_a_common_seed_nothing_was_run(suite: Any) -> None:
    found = [*rows()[:3], row("sparseloco", 1.6, seed=1)]
    assert broken(suite, found) == [f"{name} was not run" for name in suite.SUITE]
    assert broken(suite, rows()[:2]) == ["diloco was not run", "sparseloco was not run"]
