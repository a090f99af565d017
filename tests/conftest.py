"""Eight virtual CPU devices and a cache of compiled programs for every test; set before jax starts its backend."""

import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of a test's time is compiling tiny programs, and many tests compile the same ones.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"mor_jax-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import pytest
from hypothesis import settings

# Few examples, because each shape is compiled anew, and the same ones in every run.
settings.register_profile("small", max_examples=8, deadline=None, derandomize=True, database=None)
settings.load_profile("small")

# With MOR_REQUIRE_ORACLES=1 (as .ci/run sets it) a skipped test fails, unless its reason contains one of these.
ALLOWED_SKIPS = (
    "needs a GPU",
    "needs a TPU",
    "needs libtpu",  # a few hundred MB; only where `-m tpu_compile` asks for it
    "real data are not on this machine",  # a few hundred MB; small files made by hand are read everywhere
    "real models are not on this machine",  # several hundred MB; the same check runs on tiny random models everywhere
)


def forbidden_skip(report, require_oracles: bool) -> str | None:
    """The reason of a skip that must not happen here, or None. An expected failure is no skip."""
    if not require_oracles or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return None if any(allowed in reason for allowed in ALLOWED_SKIPS) else reason


def _require(report):
    reason = forbidden_skip(report, os.environ.get("MOR_REQUIRE_ORACLES") == "1")
    if reason is not None:
        report.outcome = "failed"
        report.longrepr = f"MOR_REQUIRE_ORACLES=1 allows no skip: {reason}"


def pytest_runtest_setup(item):
    """Skip what is marked `gpu` where jax computes on something else; the backend starts only if such a test is met."""
    if item.get_closest_marker("gpu") is not None:
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU: jax computes on {jax.default_backend()}")


@pytest.fixture(scope="module", autouse=True)
def released_programs():
    """What a module compiled is let go after it.

    Each program takes several memory maps, of which Linux gives a process 65,530: with the programs of all tests XLA
    fails to get one, and the process dies.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """A third less time where each program is compiled for a few calls, and nothing is about speed."""
    import jax  # not above: the backend must not start before the flags are read

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn the skip of one test into its failure where every oracle is required."""
    report = yield
    _require(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for `pytest.importorskip` at the top of a file, which skips the file while it is collected."""
    report = yield
    _require(report)
    return report
