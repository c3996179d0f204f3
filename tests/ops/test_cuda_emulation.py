"""The CUDA kernels, their very source, run on the CPU by an emulator, against references that share no code with them.

The emulator runs the threads of a block in an order that a seed chooses; results must be the same bits in all.
What it cannot show: weaker memory ordering, real alignment faults, speed.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
ORDERS = {"lowest-first": 4, "highest-first": 5, "any": 6, "warp-by-warp": 7}
CANONICAL_NAN = 0x7FC00000
P = ctypes.c_void_p
I32, I64, U32, U64 = ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
SIGNATURES = {
    "emulate_faulty": [I32, P, U64],
    "emulate_select_chunk": [P, I64, I64, P, I32, U32, P, I32, U64],
    "emulate_finish": [P, I64, I32, P, P, U64],
    "emulate_count_above": [P, I64, I64, P, I32, U32, P, P, I32, P, I32, U64],
    "emulate_gather_sum": [P, I64, P, I32, P, I32, I64, P, U64],
}


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The launch functions by name; arrays go in as pointers, a launch that is not well-defined raises."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulator of CUDA is built with g++ on Linux")
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    # Fortified longjmp refuses to change stacks; fused multiply-adds are written out where they are meant.
    flags = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, HERE / "emulation" / "kernels.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulation_error.restype = ctypes.c_char_p

    def wrap(name: str) -> Callable[..., None]:
        function = getattr(loaded, name)
        function.argtypes, function.restype = SIGNATURES[name], ctypes.c_bool

        def launch(*arguments: object) -> None:
            raw = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
            if not function(*raw):
                raise RuntimeError(loaded.emulation_error().decode())

        return launch

    return SimpleNamespace(**{name.removeprefix("emulate_"): wrap(name) for name in SIGNATURES})


def placed(shape: tuple[int, ...], dtype: type, offset: int = 0, fill: float = 0) -> np.ndarray:
    """An array that starts `offset` elements after a 64-byte border."""
    size, item = math.prod(shape), np.dtype(dtype).itemsize
    raw = np.zeros(size * item + 64 + offset * item, np.uint8)
    start = -raw.ctypes.data % 64 + offset * item
    array = raw[start : start + size * item].view(dtype).reshape(shape)
    array[...] = fill
    return array


def ranking(values: np.ndarray) -> np.ndarray:
    """Indices of each row by value descending, then index ascending; NaN before all values."""
    missing = np.isnan(values)
    index = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.lexsort((index, -np.where(missing, 0, values), ~missing), axis=1)


def adversarial(F: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(F)
    normal = rng.standard_normal(F).astype(np.float32)
    ties = rng.integers(-3, 4, F).astype(np.float32)
    few = -np.abs(normal)
    few[rng.choice(F, 5, replace=False)] = 1.0
    special = normal.copy()
    special[rng.choice(F, 9, replace=False)] = np.array([np.nan, -np.nan, np.inf, -np.inf] * 2 + [np.nan], np.float32)
    borders = np.zeros(F, np.float32)
    borders[[0, 127, 128, 2047, 2048, F - 1]] = 1.0
    return {
        "normal": normal,
        "equal": np.full(F, 0.25, np.float32),
        "minus-inf": np.full(F, -np.inf, np.float32),
        "nan": np.full(F, np.nan, np.float32),
        "negative": -np.abs(normal) - 1,
        "ascending": np.sort(normal),
        "descending": np.sort(normal)[::-1],
        "ascending-ties": np.sort(ties),
        "ties": ties,
        "few-positive": few,
        "nan-and-inf": special,
        "borders": borders,
        "signed-zeros": np.where(normal > 0, 0.0, -0.0).astype(np.float32),
        "one-exponent": (1.0 + rng.random(F) / 8).astype(np.float32),
        "last-bits": (np.float32(1.0).view(np.uint32) + rng.integers(0, 3, F).astype(np.uint32)).view(np.float32),
    }


F = 4999
CASES = adversarial(F)
ROWS = np.stack(list(CASES.values()))
SPLITS = {
    "whole": [0, F],
    "spans": [0, 2048, 4096, F],
    "uneven": [0, 1, 130, 2177, 2180, F],
}


def select(
    emulator: SimpleNamespace,
    values: np.ndarray,
    bias: np.ndarray,
    borders: list[int],
    k: int,
    seed: int,
    padding: int = 0,
    offset: int = 0,
    backwards: bool = False,
) -> np.ndarray:
    """Runs the chunks, checks the state after each against the ranking of what was seen, returns the keys."""
    T = len(values)
    guarded = np.full((T + 2, k), 0x5A5A, np.uint64)
    keys = guarded[1:-1]
    keys[:] = 0
    seen = np.zeros(values.shape[1], bool)
    with np.errstate(invalid="ignore"):
        total = values + bias
    chunks = list(itertools.pairwise(borders))
    for first, end in reversed(chunks) if backwards else chunks:
        columns = end - first
        # What is between the rows would rank above everything.
        slab = placed((T, columns + padding), np.float32, offset, np.nan)
        slab[:, :columns] = values[:, first:end]
        chunk_bias = placed((columns,), np.float32, offset)
        chunk_bias[:] = bias[first:end]
        emulator.select_chunk(slab, T, columns + padding, chunk_bias, columns, first, keys, k, seed)
        seen[first:end] = True
        positions = np.flatnonzero(seen)
        best = positions[ranking(total[:, seen])[:, :k]]
        known = best.shape[1]
        np.testing.assert_array_equal(~keys[:, :known] & 0xFFFFFFFF, best)
        assert (keys[:, known:] == 0).all()
    assert (guarded[[0, -1]] == 0x5A5A).all()
    return keys


def finish(emulator: SimpleNamespace, keys: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    acts, indices = np.full(keys.shape, -7, np.float32), np.full(keys.shape, -7, np.int64)
    emulator.finish(keys, len(keys), keys.shape[1], acts, indices, seed)
    return acts, indices


def expected_topk(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = ranking(values)[:, :k]
    best = np.take_along_axis(values, order, 1)
    acts = np.where(best > 0, best, np.float32(0))
    acts[np.isnan(best)] = np.uint32(CANONICAL_NAN).view(np.float32)
    return acts, order


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 50, 1024])
def test_top_k_is_exact_on_adversarial_rows_whatever_order_threads_run_in(
    emulator: SimpleNamespace, k: int, order: str
) -> None:
    bias = np.zeros(F, np.float32)
    keys = select(emulator, ROWS, bias, SPLITS["spans"], k, ORDERS[order])
    acts, indices = finish(emulator, keys, ORDERS[order])
    expected_acts, expected_indices = expected_topk(ROWS, k)
    np.testing.assert_array_equal(indices, expected_indices)
    assert_same_bits(acts, expected_acts)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("k", [7, 128, 300])
def test_top_k_does_not_depend_on_how_features_are_split(
    emulator: SimpleNamespace, k: int, split: str, backwards: bool
) -> None:
    bias = np.random.default_rng(k).standard_normal(F).astype(np.float32)
    bias[::3] = 0
    for seed in ORDERS.values():
        keys = select(emulator, ROWS, bias, SPLITS[split], k, seed, backwards=backwards)
        with np.errstate(invalid="ignore"):
            expected_acts, expected_indices = expected_topk(ROWS + bias, k)
        acts, indices = finish(emulator, keys, seed)
        np.testing.assert_array_equal(indices, expected_indices)
        assert_same_bits(acts, expected_acts)


@pytest.mark.parametrize(("padding", "offset"), [(0, 1), (3, 0), (4, 0), (1, 3), (8, 4)])
def test_slabs_of_any_stride_and_alignment_are_read_within_their_columns(
    emulator: SimpleNamespace, padding: int, offset: int
) -> None:
    width = 4100
    bias = np.linspace(-1, 1, width, dtype=np.float32)
    select(emulator, ROWS[:, :width], bias, [0, 2048, 4096, width], 50, ORDERS["any"], padding, offset)


@pytest.mark.parametrize(("features", "k"), [(1, 1), (3, 3), (129, 129), (1024, 1024), (2049, 1024), (2047, 129)])
def test_k_may_be_all_features(emulator: SimpleNamespace, features: int, k: int) -> None:
    for borders in ([0, features], [0, (features + 1) // 2, features] if features > 1 else [0, 1]):
        keys = select(emulator, ROWS[:, :features], np.zeros(features, np.float32), borders, k, ORDERS["any"])
        np.testing.assert_array_equal(finish(emulator, keys, 0)[1], ranking(ROWS[:, :features])[:, :k])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("survivors", [1, 127, 128, 129, 257])
def test_survivors_wait_for_the_end_of_the_chunk_and_are_not_lost(
    emulator: SimpleNamespace, survivors: int, order: str
) -> None:
    values = np.full((5, 4 * 2048), -1, np.float32)
    rng = np.random.default_rng(survivors)
    values[:, :2048] = rng.standard_normal((5, 2048))
    spans = [slice(2048, 4096), slice(4096, 6144), slice(6144, 8192), slice(2048, 8192), slice(2048, 4096)]
    for row, span in enumerate(spans):
        places = rng.choice(np.arange(span.start, span.stop), survivors, replace=False)
        values[row, places] = 10 + rng.permutation(survivors)
    # With those that wait, all of a span: as full as the buffer gets.
    values[4, 4096:6144] = np.arange(1000, 3048)
    for k in (5, 200):
        select(emulator, values, np.zeros(4 * 2048, np.float32), [0, 2048, 8192], k, ORDERS[order])


@pytest.mark.parametrize("k", [2, 50, 1024])
def test_one_survivor_just_above_the_kth_enters_within_the_same_launch(emulator: SimpleNamespace, k: int) -> None:
    values = np.full((2, 3 * 2048), -1, np.float32)
    values[:, :2048] = np.random.default_rng(k).permutation(2048)
    values[0, 2500] = 2048 - k + 0.5
    values[1, 4500] = 2048 - k + 0.5
    for seed in ORDERS.values():
        select(emulator, values, np.zeros(3 * 2048, np.float32), [0, 3 * 2048], k, seed)


def test_top_k_is_exact_on_random_problems_with_many_ties(emulator: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        features = int(rng.integers(1, 6000))
        k = int(min(features, rng.choice([1, 2, 33, 100, 256, 500, 1024])))
        borders = sorted({0, features, *rng.integers(0, features, int(rng.integers(0, 4))).tolist()})
        values = rng.integers(-40, 41, (4, features)).astype(np.float32) * np.float32(rng.choice([1e-30, 1, 1e30]))
        bias = rng.integers(-1, 2, features).astype(np.float32)
        select(emulator, values, bias, borders, k, seed, int(rng.integers(0, 5)), backwards=bool(seed % 3 == 0))


def test_finish_takes_keys_in_any_order_and_leaves_empty_slots_zero(emulator: SimpleNamespace) -> None:
    keys = select(emulator, ROWS[:, :40], np.zeros(40, np.float32), [0, 40], 50, 0)
    shuffled = np.random.default_rng(0).permuted(keys, axis=1)
    acts, indices = finish(emulator, shuffled, ORDERS["any"])
    expected_acts, expected_indices = expected_topk(ROWS[:, :40], 40)
    np.testing.assert_array_equal(indices[:, :40], expected_indices)
    assert_same_bits(np.ascontiguousarray(acts[:, :40]), expected_acts)
    assert not acts[:, 40:].any()
    assert not indices[:, 40:].any()


def counts_above(total: np.ndarray, values: np.ndarray, features: np.ndarray) -> np.ndarray:
    """How many columns rank above each chosen feature, itself left out."""
    index = np.arange(total.shape[1])
    result = np.zeros(values.shape, np.int64)
    for row, own in np.ndindex(*values.shape):
        value, feature, columns = values[row, own], features[own], total[row]
        missing = np.isnan(columns)
        if np.isnan(value):
            above = missing & (index < feature)
        else:
            above = missing | (columns > value) | ((columns == value) & (index < feature))
        above[feature] = False
        result[row, own] = above.sum()
    return result


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("chosen", "k"), [(1, 50), (20, 1), (20, 50), (256, 3), (600, 50), (600, 6000)])
def test_counts_of_features_above_are_exact_below_k(
    emulator: SimpleNamespace, chosen: int, k: int, order: str
) -> None:
    rng = np.random.default_rng(chosen)
    bias = rng.standard_normal(F).astype(np.float32) * np.float32(0.1)
    with np.errstate(invalid="ignore"):
        total = ROWS + bias
    # The best ones of some rows, so that counts below k occur, and anything.
    best = ranking(total)[:, :4].flatten()
    features = np.concatenate([rng.permutation(best)[: chosen // 2], rng.integers(0, F, chosen)])[:chosen]
    values = np.ascontiguousarray(total[:, features])
    # Another product may round a chosen feature's value differently: up, down, or not.
    up = np.nextafter(values, np.float32(np.inf))
    down = np.nextafter(values, np.float32(-np.inf))
    values = np.ascontiguousarray(np.choose(rng.integers(0, 3, values.shape), [values, up, down]))
    counts = np.zeros(values.shape, np.int32)
    for first, end in [(0, 3), (3, 2051), (2051, F)]:
        columns = end - first
        slab = placed((len(ROWS), columns + 1), np.float32, 0, np.nan)
        slab[:, :columns] = ROWS[:, first:end]
        emulator.count_above(
            slab, len(ROWS), columns + 1, np.ascontiguousarray(bias[first:end]), columns, first,
            values, features, chosen, counts, k, ORDERS[order],
        )  # fmt: skip
        seen = np.where(np.arange(F) < end, total, -np.inf)
        expected = counts_above(seen, values, features)
        # Ties with -inf aside, which are not open, an unseen feature is above none.
        is_open = ~(values <= 0)
        assert (counts[~is_open] == 0).all()
        exact = is_open & (expected < k)
        np.testing.assert_array_equal(counts[exact], expected[exact])
        assert (counts[is_open & (expected >= k)] >= k).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_decided_feature_stays_decided_and_an_open_one_is_counted_on(emulator: SimpleNamespace, order: str) -> None:
    columns = 3 * 2048
    slab = np.full((1, columns), 0.5, np.float32)
    # Enough above feature 0 in the first span; above feature 1 one in the last.
    slab[0, 10:20], slab[0, 6000] = 2.0, 9.0
    values, features = np.array([[1.0, 4.0, -1.0]], np.float32), np.array([0, 1, 2])
    counts = np.array([[0, 0, 0]], np.int32)
    zeros = np.zeros(columns, np.float32)
    emulator.count_above(slab, 1, columns, zeros, columns, 0, values, features, 3, counts, 10, ORDERS[order])
    assert counts[0, 0] >= 10
    assert counts[0, 1:].tolist() == [1, 0]


fmaf = ctypes.CDLL(None).fmaf
fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "offset"), [(8, 0), (520, 0), (520, 1), (1032, 0), (1100, 0), (37, 0), (130, 2)])
def test_sums_of_rows_are_taken_in_order_with_one_rounding_each(
    emulator: SimpleNamespace, dtype: torch.dtype, width: int, offset: int
) -> None:
    rng = np.random.default_rng(width)
    rows, k, features = 2, 9, 30
    kind = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
    W = torch.from_numpy(rng.standard_normal((features, width)).astype(np.float32)).to(dtype)
    bits = placed((features, width), np.uint32 if kind == 0 else np.uint16, offset)
    bits[:] = W.view(torch.int32 if kind == 0 else torch.int16).numpy().view(bits.dtype)
    weights = rng.standard_normal((rows, k)).astype(np.float32)
    indices = rng.integers(0, features, (rows, k))
    guarded = placed((rows + 2, width), np.float32, 0, -7)
    out = guarded[1:-1]
    emulator.gather_sum(weights, rows, indices, k, bits, kind, width, out, ORDERS["any"])
    wide = W.float().numpy()
    expected = np.zeros((rows, width), np.float32)
    for row in range(rows):
        for weight, index in zip(weights[row], indices[row], strict=True):
            for column in range(width):
                expected[row, column] = fmaf(weight, wide[index, column], expected[row, column])
    assert_same_bits(np.ascontiguousarray(out), expected)
    assert (guarded[[0, -1]] == -7).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 50, 128, 129, 300])
def test_zero_weights_are_skipped_also_where_the_matrix_is_nan(emulator: SimpleNamespace, k: int, order: str) -> None:
    rng = np.random.default_rng(k)
    W = rng.integers(-8, 9, (40, 72)).astype(np.float32)
    W[:20] = np.nan
    indices = rng.integers(0, 40, (5, k))
    weights = np.where(indices < 20, 0, rng.integers(-3, 4, (5, k))).astype(np.float32)
    weights[0] = 0
    out = np.full((5, 72), -7, np.float32)
    emulator.gather_sum(weights, 5, indices, k, W, 0, 72, out, ORDERS[order])
    np.testing.assert_array_equal(out, np.einsum("tk,tkd->td", weights, np.nan_to_num(W)[indices]))


def test_a_nan_weight_and_special_halves_come_through(emulator: SimpleNamespace) -> None:
    values = torch.tensor([[np.inf, -np.inf, np.nan, 6e-8, -6.1e-5, 65504.0, -0.0, 1.0]], dtype=torch.float16)
    out = np.zeros((2, 8), np.float32)
    weights, indices = np.array([[1.0], [np.nan]], np.float32), np.zeros((2, 1), np.int64)
    emulator.gather_sum(weights, 2, indices, 1, values.view(torch.int16).numpy(), 2, 8, out, 0)
    np.testing.assert_array_equal(out[0], values[0].float().numpy())
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize(
    ("fault", "match"),
    [(0, "hang.* exited"), (1, "divergence"), (2, "hang"), (3, "past the end of shared memory, byte 128")],
)
@pytest.mark.parametrize("order", ORDERS)
def test_the_emulator_reports_what_a_gpu_would_not_survive(
    emulator: SimpleNamespace, fault: int, match: str, order: str
) -> None:
    with pytest.raises(RuntimeError, match=match):
        emulator.faulty(fault, np.zeros(128, np.int32), ORDERS[order])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", [4, 5])
def test_a_missing_barrier_and_unwritten_shared_memory_show(emulator: SimpleNamespace, fault: int, order: str) -> None:
    seen = np.zeros(128, np.int32)
    emulator.faulty(fault, seen, ORDERS[order])
    assert (seen == -1).any()
