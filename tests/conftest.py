"""Eight simulated CPU devices for the whole suite, and a compilation cache so that equal programs compile once.

Compiling is most of the time that the tests take, and LLVM most of compiling: they compile without its optimization, in a third of the
time, and each program as one module, in a tenth less. With MAXTRAIN_TEST_COMPILE set and empty they compile as users do.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "MAXTRAIN_TEST_CACHE" not in os.environ:  # the workers of xdist and the processes that tests start inherit all of this
    fast = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):  # later versions end the process at a flag they no longer have
        fast += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("MAXTRAIN_TEST_COMPILE", fast)
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", os.environ["MAXTRAIN_TEST_COMPILE"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["MAXTRAIN_TEST_CACHE"] = tempfile.mkdtemp(prefix="maxtrain-xla-")
    atexit.register(shutil.rmtree, os.environ["MAXTRAIN_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["MAXTRAIN_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long tier too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        kept = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = kept
    elif os.environ["MAXTRAIN_TEST_COMPILE"]:  # scripts/test.sh --all runs these once more, compiled as users do
        close = [item for item in items if {"slow", "as_users"} <= set(item.keywords)]
        config.hook.pytest_deselected(items=close)
        items[:] = [item for item in items if item not in close]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530: a worker that runs the whole suite has too few."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A folder for prepared data, shared by the tests of one worker."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache_dir):
    """The folder of a finished run of tiny.yml, trained on one device."""
    import jax

    from maxtrain.config import load
    from maxtrain.parallel import mesh
    from maxtrain.training.loop import Trainer

    folder, make_mesh = tmp_path_factory.mktemp("trained") / "run", mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        Trainer(load(Path(__file__).parent / "tiny.yml", [f"run.dir={folder}", f"data.cache_dir={cache_dir}"]).config).fit()
    return folder
