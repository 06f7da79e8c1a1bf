from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.core
import pytest
import torch

if torch.accelerator.device_count() == 0:
    # Without an accelerator Triton's interpreter runs the kernels. Read when Triton is imported, as others do too.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests neither read nor fill a user's cache, and none knows what another one has found out.
os.environ["HALOVAE_CACHE"] = "off"

from families import SHARED
from ranks import Ranks
from servers import Server, disk

from halovae.kernels import convolution
from halovae.kernels.cpu import pieces
from halovae.kernels.lazy import upsampled
from halovae.pipelines.demo import make_demo_model


def _let_loops_end_at_tensors() -> None:
    """Triton 3.6's interpreter makes numbers of arrays of one element by `int`, which numpy 2.4 refuses."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") and importlib.util.find_spec("triton"):
    _let_loops_end_at_tensors()

pytest_plugins = ["counting"]
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One seed for all random examples of a run: that of the option, or that of the run which this is a worker of."""
    given = getattr(config, "workerinput", {}).get("hypothesis_seed", config.option.hypothesis_seed)
    config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32) if given is None else given)
    hypothesis.core.global_force_seed = int(config.option.hypothesis_seed)
    if not hasattr(config, "workerinput"):  # Workers and their children inherit it.
        folder = tempfile.TemporaryDirectory(prefix="halovae-tests-")
        os.environ[SHARED] = folder.name
        config.add_cleanup(folder.cleanup)


LONG = (
    "exact_families", "stream", "serve", "parts", "dataset", "graphs", "docs", "predict", "tile_stream", "service",
    "cli_modes", "tile_families", "cli_ranks", "generation", "cli_plan", "agreement", "parallel", "merge", "pipelines",
    "launch", "alone", "families", "retreat", "optimize", "fit", "gpu_kernels", "cli", "report_browser", "gpu_rules",
    "link", "autocast", "groups", "tile_run", "verdicts", "room", "verify",
)  # fmt: skip
"""The groups that take longest, which go first: a worker that finds one at the end lets the others wait."""


ONE_SERVER = ("serve", "serve_connections", "serve_crash", "serve_fuzz", "serve_online", "serve_page")
"""Files whose tests share a server, and so a worker."""


def _group_of(nodeid: str) -> str:
    file = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
    return "serve" if file in ONE_SERVER else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = [*LONG, ""]
    items.sort(key=lambda item: groups.index(group if (group := _group_of(item.nodeid)) in LONG else ""))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported and collected stays: the collector would walk over it again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What shares a server, or what a file has made, stays in one worker.

    Not by marks: pytest 9.2 keeps the names of tests where xdist 3.8 can't add a group to them, and spreads all tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Parallel workers draw no seed of their own: the one that is printed is theirs too."""
    node.workerinput["hypothesis_seed"] = node.config.option.hypothesis_seed


def pytest_report_header(config: pytest.Config) -> str:
    """The seed of this run's random examples; `--hypothesis-seed` gives the same ones again."""
    return f"hypothesis seed {config.option.hypothesis_seed}"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels' pieces so small that even a test's picture is cut into several."""
    for module in (convolution, upsampled):
        monkeypatch.setattr(module, "WINDOW_BYTES", 1)
    monkeypatch.setattr(pieces, "MANY", 1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `halovae make-demo-model` writes."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    make_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One on two ranks, with its jobs on a small disk, for all tests: they leave no job behind."""
    store = tmp_path_factory.mktemp("server") / "store"
    with disk(store):
        running = Server(demo_model, store, "--ranks", "2").until_ready()
        yield running
        code, said = running.stop()
    assert code == 0, said
    assert len(said.splitlines()) < 200, said
