"""How many random shapes a run of the tests has tried: counted, printed at its end, and enforced when all tests run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis.statistics import collector

RANDOM_SHAPES = "random shapes"
"""The property under which a test says how many it has tried (`record_property`)."""
LEAST = 500
OF_SHAPES = ("geometry", "layout", "plan", "windows", "compositions", "refusals", "service")
"""The files whose random examples are sizes and cuts. Those of other files are not counted."""

_found: Counter[str] = Counter()
"""By file. In the process that the user has started, which hears from all parallel workers."""


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Within the hook of hypothesis, which listens to the statistics of its tests."""
    known = collector.value

    def note(statistics: dict[str, Any]) -> None:
        phases = (statistics.get(f"{name}-phase", {}) for name in ("reuse", "generate"))
        tried = sum(case["status"] == "valid" for phase in phases for case in phase.get("test-cases", ()))
        item.user_properties.append((RANDOM_SHAPES, tried))
        known(statistics)

    if known is None:
        return (yield)
    with collector.with_value(note):
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0].rpartition("test_")[2].removesuffix(".py")
    if report.when == "call" and file in OF_SHAPES:
        _found[file] += sum(value for name, value in report.user_properties if name == RANDOM_SHAPES)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _too_few(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _found.total():
        return
    files = ", ".join(f"{file} {count}" for file, count in sorted(_found.items()) if count)
    terminalreporter.write_line(f"{RANDOM_SHAPES}: {_found.total()} ({files})")
    if _too_few(config):
        terminalreporter.write_line(f"fewer than {LEAST} {RANDOM_SHAPES}: this run has failed", red=True)


def _too_few(config: pytest.Config) -> bool:
    """Whether all tests were asked for, in this process or workers of it, and tried too little."""
    parts = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "collectonly", "maxfail")
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(
        config.getoption(name, None) for name in parts
    )
    return whole and not hasattr(config, "workerinput") and _found.total() < LEAST
