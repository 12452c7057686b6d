"""A run is the same alone and among others, bit for bit on CPU; and a program is compiled once."""

import dataclasses

import jax
import numpy as np
import pytest

from mlp_jax.errors import UserError
from mlp_jax.training import programs, step
from mlp_jax.training.arrays import for_dataset
from mlp_jax.training.config import RECIPES
from mlp_jax.training.fit import fit
from mlp_jax.training.parallel import Placement, RunBytes, place
from mlp_jax.training.run import make_run


def one_device():
    return Placement(tuple(jax.devices()[:1]), lanes=1)


def two_devices(lanes=1):
    return Placement(tuple(jax.devices()[:2]), lanes=lanes)


def train(config, dataset, seeds, *, placement=None, rates=None, start=None):
    """What a training has after its last epoch, with its states on the host."""
    rates = rates or [config.learning_rate] * len(seeds)
    runs = [make_run(seed, rate) for seed, rate in zip(seeds, rates, strict=True)]
    placement = placement or one_device()
    *_, last = fit(config, dataset, runs, placement=placement, start=start)
    return last.snapshot()


def rows(snapshot):
    """What a run leaves, as bytes, one tuple a run."""
    leaves = jax.tree.leaves((snapshot.states, snapshot.history, snapshot.predictions))
    return [tuple(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0]))]


def test_a_row_is_the_single_run_bit_for_bit(config, small):
    alone = [rows(train(config, small, [seed]))[0] for seed in range(5)]
    assert len(set(alone)) == 5
    results = {
        "one device": train(config, small, [0, 1, 2, 3, 4]),
        "two devices": train(config, small, [0, 1, 2, 3], placement=two_devices()),
        "another order": train(config, small, [3, 0, 4, 1], placement=two_devices()),
        "padded": train(config, small, [2, 1, 0], placement=two_devices()),
    }
    orders = {"one device": range(5), "two devices": range(4), "another order": [3, 0, 4, 1]}
    for name, result in results.items():
        wanted = [alone[seed] for seed in orders.get(name, [2, 1, 0])]
        assert rows(result) == wanted, name


@pytest.mark.network
@pytest.mark.parametrize("recipe", ["keras-sgd", "keras-rmsprop"])
def test_a_row_is_the_single_run_bit_for_bit_on_mnist(recipe, mnist):
    config = dataclasses.replace(RECIPES[recipe], epochs=2)
    many = train(config, mnist, [7, 3, 5], placement=two_devices())
    for i, seed in enumerate([7, 3, 5]):
        assert rows(train(config, mnist, [seed]))[0] == rows(many)[i]


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_vmapped_lanes_agree_closely(config, small, optimizer):
    config = dataclasses.replace(config, optimizer=optimizer, learning_rate=0.003)
    seeds = [0, 1, 2, 3, 4, 5]
    lanes = train(config, small, seeds, placement=two_devices(lanes=2))
    alone = train(config, small, seeds)
    for name in ("train_loss", "test_loss"):
        np.testing.assert_allclose(lanes.history[name], alone.history[name], rtol=1e-4)


def test_learning_rates_are_traced(config, small):
    grid = train(config, small, [0, 0, 1], rates=[0.1, 0.02, 0.1])
    alone = dataclasses.replace(config, learning_rate=0.02)
    assert rows(grid)[1] == rows(train(alone, small, [0]))[0]
    assert rows(grid)[0] != rows(grid)[1]


def test_compiled_once(config, small):
    programs._compile.cache_clear()
    train(config, small, [0, 1, 2, 3], placement=two_devices())
    train(dataclasses.replace(config, epochs=4), small, [4, 5, 6, 7], placement=two_devices())
    train(config, small, [8], placement=two_devices())  # a padded last chunk
    train(config, small, range(4), placement=two_devices(), rates=[0.1, 0.2, 0.3, 0.4])
    assert programs._compile.cache_info().misses == 1
    train(dataclasses.replace(config, dropout=0.5), small, range(4), placement=two_devices())
    assert programs._compile.cache_info().misses == 2  # the count can change


def test_what_was_traced_is_compiled(config, small, monkeypatch):
    """Once with the settings of the training, whose trace is compiled; twice to compare."""
    calls, train_epoch = [], programs.train_epoch

    def traced(*args, **options):
        calls.append(options["config"].learning_rate)
        return train_epoch(*args, **options)

    monkeypatch.setattr(programs, "train_epoch", traced)
    programs._compile.cache_clear()
    train(config, small, [0, 1], placement=two_devices())
    shared = [values["learning_rate"] for values in (programs.FIXED_VALUES, programs.OTHER_VALUES)]
    assert calls == [config.learning_rate, *shared]
    train(config, small, [2])
    train(config, small, [3])
    assert calls[3:] == [config.learning_rate, *shared, config.learning_rate]


def test_given_programs_are_not_traced_again(config, small, monkeypatch):
    placement = two_devices()
    compiled = programs.current_programs(config, placement, small.arrays)
    monkeypatch.setattr(programs, "train_epoch", None)
    *_, last = fit(config, small, seeds=[0, 1], placement=placement, programs=compiled)
    assert last.epoch == config.epochs


def test_each_epoch_is_yielded_as_it_ends(config, small):
    seen = list(fit(config, small, seeds=[0, 1, 2], placement=two_devices()))
    assert [progress.epoch for progress in seen] == [1, 2]
    first, last = (progress.history for progress in seen)
    for name in ("train_loss", "test_loss", "test_correct"):
        assert last[name].shape == (3, 2)
        np.testing.assert_array_equal(first[name], last[name][:, :1])
    assert last["test_correct"].dtype == np.int32
    for progress in seen:
        assert progress.predictions.dtype == np.uint8
        correct = (progress.predictions == small.test.labels).sum(1)
        np.testing.assert_array_equal(correct, progress.history["test_correct"][:, -1])
        np.testing.assert_array_equal(progress.test_accuracy, correct / 130)


def test_leaving_the_loop_stops_and_a_snapshot_resumes(config, small):
    config = dataclasses.replace(config, optimizer="adam", learning_rate=0.01, epochs=4)
    for progress in fit(config, small, seeds=[3, 4, 5], placement=two_devices()):
        if progress.epoch == 2:
            break
    rest = train(config, small, [3, 4, 5], start=progress.snapshot())  # on another device count
    assert rows(rest) == rows(train(config, small, [3, 4, 5]))
    assert rest.epoch == 4


def test_the_length_of_the_training_is_traced(config, small):
    """A schedule falls over all epochs, which one compiled program serves."""
    config = dataclasses.replace(config, schedule="linear")
    programs._compile.cache_clear()
    short, long = (
        train(dataclasses.replace(config, epochs=epochs), small, [0]) for epochs in (1, 4)
    )
    assert programs._compile.cache_info().misses == 1
    assert short.history["train_loss"][0, 0] != long.history["train_loss"][0, 0]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_reads_what_its_program_is_given(name, small):
    config = dataclasses.replace(RECIPES[name], hidden=(8,), batch_size=32, teacher="")
    config = for_dataset(config, small)
    values = (programs.FIXED_VALUES, programs.OTHER_VALUES)
    assert len({programs.fingerprint_code(config, small.arrays, each) for each in values}) == 1


@pytest.mark.parametrize("setting", ["epochs", "learning_rate", "split"])
def test_a_fork_that_reads_what_programs_share_is_refused(setting, config, small, monkeypatch):
    """One compiled program serves all lengths and rates, so it would read a fixed value."""

    def schedule(progress, *, config):
        return 1 - progress / sum(map(ord, repr(getattr(config, setting))))

    monkeypatch.setattr(step, "schedule", schedule)
    with pytest.raises(
        UserError, match=r"config\.learning_rate, config\.epochs, .*do not read them"
    ):
        fit(config, small, seeds=[0])


def test_a_fork_that_treats_one_data_set_otherwise_is_refused(config, small, monkeypatch):
    def schedule(progress, *, config):
        return 0.5 if config.dataset == "mine" else 1.0

    monkeypatch.setattr(step, "schedule", schedule)
    fit(config, small, seeds=[0])
    with pytest.raises(UserError, match="do not read them"):
        fit(config, small._replace(name="mine"), seeds=[0])


def test_a_fork_that_treats_some_lengths_otherwise_is_refused_for_these(config, small, monkeypatch):
    def schedule(progress, *, config):
        return 1 - progress if 3 <= config.epochs <= 4 else 1.0

    monkeypatch.setattr(step, "schedule", schedule)
    fit(dataclasses.replace(config, epochs=2), small, seeds=[0])
    with pytest.raises(UserError, match="do not read them"):
        fit(dataclasses.replace(config, epochs=3), small, seeds=[0])


@pytest.mark.parametrize("setting", ["epochs", "learning_rate"])
@pytest.mark.parametrize("threshold", [0.05, 0.7, 5, 500])
def test_a_fork_that_treats_long_or_fast_runs_otherwise_is_refused(
    setting, threshold, config, small, monkeypatch
):
    def schedule(progress, *, config):
        return 1 - progress if getattr(config, setting) > threshold else 1.0

    monkeypatch.setattr(step, "schedule", schedule)
    programs._compile.cache_clear()  # other thresholds give the same program
    with pytest.raises(UserError, match="do not read them"):
        fit(config, small, seeds=[0])


def test_a_metric_is_one_line(config, small, monkeypatch):
    """What the loss returns beside itself reaches the history by its name."""

    def loss_fn(params, batch, keys, *, config):
        loss, metrics = step_loss(params, batch, keys, config=config)
        return loss, metrics | {"images": jax.numpy.float32(2)}

    step_loss = step.loss_fn
    monkeypatch.setattr(step, "loss_fn", loss_fn)
    programs._compile.cache_clear()
    history = train(config, small, [0, 1]).history
    programs._compile.cache_clear()
    np.testing.assert_allclose(history["train_images"], 2, rtol=1e-6)


def test_a_metric_is_a_number(config, small, monkeypatch):
    """Said before anything is trained, which could not be stored."""

    def by_class(params, split, *, config):
        metrics, predictions = evaluate(params, split, config=config)
        return metrics | {"by_class": jax.numpy.bincount(predictions, length=4)}, predictions

    evaluate = programs.evaluate
    monkeypatch.setattr(programs, "evaluate", by_class)
    for runs in ([0], [0, 1]):
        with pytest.raises(UserError, match="the metric test_by_class must be one number per run"):
            train(config, small, runs)


def test_batch_larger_than_the_set_is_refused(config, small):
    assert for_dataset(config, small).n_classes == 4
    with pytest.raises(UserError, match="batch size 301 is larger than the 300"):
        for_dataset(dataclasses.replace(config, batch_size=301), small)


def test_data_is_held_once_a_device_as_uint8(small):
    place_data = two_devices().replicated
    held = jax.device_put(small.train, place_data)
    again = jax.device_put(held, place_data)  # as for every group of a sweep
    assert held.images.dtype == np.uint8
    shards = held.images.addressable_shards
    assert [shard.device for shard in shards] == list(two_devices().devices)
    for shard, same in zip(shards, again.images.addressable_shards, strict=True):
        np.testing.assert_array_equal(shard.data, small.train.images)
        assert shard.data.unsafe_buffer_pointer() == same.data.unsafe_buffer_pointer()


SIZE = RunBytes(state=2 * 2**20, total=10 * 2**20)


def test_place():
    assert place(5, SIZE) == two_devices()
    assert place(5, SIZE, devices=1, lanes=3) == Placement(tuple(jax.devices()[:1]), 3)
    assert place(1, SIZE) == one_device()
    with pytest.raises(UserError, match="devices 3: only 2 here"):
        place(5, SIZE, devices=3)


class FakeDevice:
    def __init__(self, memory, platform="gpu", device_kind="NVIDIA A100"):
        self.memory, self.platform, self.device_kind = memory, platform, device_kind

    def memory_stats(self):
        return {"bytes_limit": self.memory}


@pytest.mark.parametrize(
    ("memory", "n_runs", "lanes"),
    [(80 * 2**30, 1000, 256), (80 * 2**30, 9, 9), (2**30, 1000, 51), (2**20, 1000, 1)],
)
def test_lanes_on_a_gpu_are_what_fits_and_what_helps(memory, n_runs, lanes, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(memory)])
    assert place(n_runs, SIZE).lanes == lanes
