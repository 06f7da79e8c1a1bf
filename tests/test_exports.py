"""What `import halovae` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import halovae
import halovae.pipelines
from halovae.base import errors

PUBLIC = {
    "CallReport",
    "DisagreementError",
    "HalovaeError",
    "Handle",
    "InputError",
    "NotExactError",
    "Options",
    "RankFailedError",
    "Sharded",
    "TilingError",
    "TooLittleMemoryError",
    "VerificationError",
    "optimize",
    "parallelize",
    "restore",
    "sharded",
    "summary",
}


def test_public_names() -> None:
    assert set(halovae.__all__) == PUBLIC
    assert {name for name in dir(halovae) if not name.startswith("__")} == PUBLIC
    assert list(halovae.__all__) == sorted(halovae.__all__)


@pytest.mark.parametrize("name", halovae.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(halovae, name).__doc__


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'parallelise'"):
        halovae.parallelise  # noqa: B018


def test_the_version_is_a_version() -> None:
    assert [part.isdigit() for part in halovae.__version__.split(".")] == [True, True, True]


def test_nothing_is_imported_before_it_is_needed() -> None:
    """Neither by the package, nor by the one of pipelines; and diffusers not by the core and a dataset's readers."""
    code = """
import sys, halovae
import halovae.pipelines as p
print(sorted({"torch", "diffusers", "numpy", "av"} & set(sys.modules)))
from halovae import parallelize, sharded
from halovae.datasets import workers
print("diffusers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]


def test_the_pipelines_package_gives_what_its_users_need() -> None:
    assert all(getattr(halovae.pipelines, name).__doc__ for name in halovae.pipelines.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Runer'"):
        halovae.pipelines.Runer  # noqa: B018


def test_errors_are_one_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, halovae.HalovaeError) for kind in kinds)
    assert {kind.__name__ for kind in kinds} == {name for name in PUBLIC if name.endswith("Error")}
    assert issubclass(halovae.DisagreementError, ValueError)
    assert issubclass(halovae.NotExactError, NotImplementedError)


def test_modules_by_their_old_names() -> None:
    program = """
import sys, warnings
warnings.simplefilter("error")
try:
    import halovae.errors
except DeprecationWarning as warning:
    print(warning)
warnings.simplefilter("ignore")
import halovae.errors, halovae.parallel, halovae.base.errors, halovae.api.parallelize
assert halovae.errors is halovae.base.errors and halovae.parallel is halovae.api.parallelize
assert halovae.errors.__spec__.name == "halovae.base.errors"
assert halovae.errors.InputError is halovae.InputError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "halovae.errors is halovae.base.errors now, and goes in the next version"
