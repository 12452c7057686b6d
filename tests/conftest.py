"""Every test runs on two CPU devices and raises on rank promotion; pyproject.toml makes warnings
errors."""

import hypothesis
import jax
import numpy as np
import pytest

# the same input each time; .ci/run draws other input, from a seed that it prints
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

from commands import TINY  # noqa: E402

from mlp_jax.data import dataset as datasets  # noqa: E402
from mlp_jax.records.checkpoint import load_committee  # noqa: E402
from mlp_jax.sweep import main as sweep_main  # noqa: E402
from mlp_jax.training.arrays import Dataset, Split, make_dataset  # noqa: E402
from mlp_jax.training.config import Config  # noqa: E402


def make_split(seed: int, n: int) -> Split:
    """Images whose bright quarter says their class, under noise: learnable in an epoch or two."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n).astype(np.int32)
    images = rng.integers(0, 100, (n, 4, 196))
    images[np.arange(n), labels] += 60
    return Split(images.reshape(n, 784).astype(np.uint8), labels)


@pytest.fixture(scope="session")
def small() -> Dataset:
    """300 training images, not a multiple of any batch size in use, and 130 test images."""
    return make_dataset("kmnist", make_split(0, 300), make_split(1, 130), 4)


@pytest.fixture(scope="session")
def small_dir(small, tmp_path_factory):
    """A data directory in which `small` is cached under the name kmnist, for other processes."""
    root = tmp_path_factory.mktemp("data")
    directory = root / "kmnist" / "3.0.1"
    directory.mkdir(parents=True)
    datasets._write_cache(directory, small)
    return root


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    """The real thing; tests that use it are marked `network`."""
    return datasets.load_dataset("mnist")


@pytest.fixture
def config() -> Config:
    """A net that trains in a blink: 300 images are 9 batches of 32 and one of 12."""
    return Config(hidden=(16, 8), batch_size=32, epochs=2, learning_rate=0.1, n_classes=4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, for commands that run in this process."""
    monkeypatch.chdir(tmp_path)
    # JAX has its devices already
    monkeypatch.setattr("mlp_jax.training.parallel.use_cores", lambda: True)
    return tmp_path


@pytest.fixture(scope="session")
def committee():
    """The five runs that come with mlp_jax."""
    return load_committee()


@pytest.fixture
def swept(small_dir, here):
    def sweep(*flags):
        sweep_main([*TINY, "--data-dir", str(small_dir), *flags])

    return sweep


@pytest.fixture
def data(small_dir):
    return ["--data-dir", str(small_dir)]
