from __future__ import annotations

import copy
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from qscope_trl.errors import CheckpointError, ConfigError, FeatureSetError
from qscope_trl.sae.suite import SAESpec, SAESuite
from tests.forked import run_forked
from tests.sae.sae_files import (
    D_MODEL,
    D_SAE,
    QWEN_NAME,
    K,
    Weights,
    random_weights,
    residuals,
    saelens_config,
    write_qwen,
    write_saelens,
    write_sparsify,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for layer in (0, 1, 2, 5):
        write_qwen(tmp_path / QWEN_NAME, layer, random_weights(layer))
    return tmp_path / QWEN_NAME


def test_facts_of_a_folder(folder: Path) -> None:
    suite = SAESuite.from_pretrained(folder)
    assert (suite.source, suite.revision, suite.layers) == (str(folder), None, (0, 1, 2, 5))
    assert (suite.d_model, suite.d_sae) == (D_MODEL, D_SAE)
    assert suite.spec(5) == SAESpec(layer=5, d_model=D_MODEL, d_sae=D_SAE, k=K, activation="topk", source=str(folder))
    assert repr(suite) == f"SAESuite('{folder}', layers 0-2, 5)"


def test_opening_reads_no_weights(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert SAESuite.from_pretrained(folder).layers == (0, 1, 2, 5)


def test_layers_narrow_the_suite_and_its_reopening(folder: Path) -> None:
    suite = SAESuite.from_pretrained(folder, layers=[5, 1, 1])
    assert suite.layers == (1, 5)
    assert SAESuite.from_pretrained(suite, layers=[5]).layers == (5,)
    assert SAESuite.from_pretrained(suite).layers == (1, 5)
    assert SAESuite.from_pretrained(suite, k=3).spec(1).k == 3
    assert suite.spec(1).k == K
    with pytest.raises(CheckpointError, match=r"Layer 2 of '.*' was not asked for: .* opened with layers 1, 5"):
        suite.spec(2)
    with pytest.raises(CheckpointError, match=r"Layer 0 of '.*' was not asked for"):
        SAESuite.from_pretrained(suite, layers=[0])
    with pytest.raises(ConfigError, match=r"`layers` is empty. Name layers of '.*' \(0-2, 5\)"):
        SAESuite.from_pretrained(folder, layers=[])


def test_missing_layer_lists_what_there_is(folder: Path) -> None:
    message = (
        rf"No SAE for layer 31 in '{folder}': found layers 0-2, 5. "
        r"Choose layers within that range, or download `layer31.sae.pt`."
    )
    with pytest.raises(CheckpointError, match=message):
        SAESuite.from_pretrained(folder, layers=[0, 31])
    with pytest.raises(CheckpointError, match=message):
        SAESuite.from_pretrained(folder).encoder_rows(31, [0])


def test_missing_layer_of_another_format_does_not_speak_of_qwen_scope_files(tmp_path: Path) -> None:
    write_saelens(tmp_path, random_weights(), saelens_config(5))
    with pytest.raises(CheckpointError, match=r"found layers 5. Choose layers within that range\.$"):
        SAESuite.from_pretrained(tmp_path, layers=[4])


def test_k_is_asked_for_only_where_it_matters(tmp_path: Path) -> None:
    write_qwen(tmp_path / "scope", 3, random_weights())
    suite = SAESuite.from_pretrained(tmp_path / "scope")
    assert suite.encoder_rows(3, [1]).W.shape == (1, D_MODEL)
    assert suite.decoder_columns(3, [1]).shape == (D_MODEL, 1)
    assert suite.d_sae == D_SAE
    assert suite.spec(3).k is None
    with pytest.raises(CheckpointError, match=r"does not say how many features are active per token. Pass `k=`"):
        suite.load(3)
    assert SAESuite.from_pretrained(tmp_path / "scope", k=4).load(3).k == 4


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "8"])
def test_k_that_is_no_count_is_refused(folder: Path, k: object) -> None:
    with pytest.raises(ConfigError, match="`k` is the number of active features per token, a whole number from 1"):
        SAESuite.from_pretrained(folder, k=k)  # type: ignore[arg-type]


def test_k_beyond_d_sae_or_for_another_activation_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`k=1025` for '.*' is outside 1 to `d_sae=1024`"):
        SAESuite.from_pretrained(folder, k=D_SAE + 1).spec(0)
    config = saelens_config(5, architecture="standard")
    write_saelens(tmp_path / "lens", random_weights(), config)
    assert SAESuite.from_pretrained(tmp_path / "lens").spec(5).k is None
    with pytest.raises(ConfigError, match=r"`k=8` was given, but the SAE '.*' has the activation `relu`"):
        SAESuite.from_pretrained(tmp_path / "lens", k=K).spec(5)


@pytest.mark.parametrize("index", [D_SAE, -1])
def test_feature_out_of_range_is_refused(folder: Path, index: int) -> None:
    suite = SAESuite.from_pretrained(folder)
    name = f"L5F{index}" if index >= 0 else index
    message = f"Feature {name} is out of range: the SAE '.*' has `d_sae=1024` features, so indices go from 0 to 1023"
    for read in (suite.encoder_rows, suite.decoder_columns):
        with pytest.raises(FeatureSetError, match=message):
            read(5, [0, index])


def with_value(weights: Weights, name: str, position: tuple[int, ...], value: float) -> Weights:
    getattr(weights, name)[position] = value
    return weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "position"), [("W_enc", (3, 4)), ("b_enc", (3,))])
def test_nan_in_the_rows_used_is_refused_and_elsewhere_not_looked_for(
    tmp_path: Path, value: float, name: str, position: tuple[int, ...]
) -> None:
    write_qwen(tmp_path / QWEN_NAME, 0, with_value(random_weights(), name, position, value))
    suite = SAESuite.from_pretrained(tmp_path / QWEN_NAME)
    assert bool(suite.encoder_rows(0, [2, 4]).W.isfinite().all())
    for call in (lambda: suite.encoder_rows(0, [2, 3]), lambda: suite.load(0)):
        with pytest.raises(
            CheckpointError, match=f"`{name}` of feature L0F3 in '.*' holds NaN or inf as torch.float32"
        ):
            call()


def test_nan_in_the_decoder_is_refused_where_the_decoder_is_used(tmp_path: Path) -> None:
    write_qwen(tmp_path / QWEN_NAME, 0, with_value(random_weights(), "W_dec", (4, 3), float("nan")))
    write_qwen(tmp_path / QWEN_NAME, 1, with_value(random_weights(), "b_dec", (4,), float("nan")))
    suite = SAESuite.from_pretrained(tmp_path / QWEN_NAME)
    assert suite.load(0, decoder=False).W_dec is None
    for call in (lambda: suite.decoder_columns(0, [3]), lambda: suite.load(0)):
        with pytest.raises(CheckpointError, match=r"`W_dec` of feature L0F3"):
            call()
    with pytest.raises(CheckpointError, match=r"`b_dec` in '.*' holds NaN or inf"):
        suite.load(1)


def test_value_that_overflows_the_asked_for_dtype_is_refused(tmp_path: Path) -> None:
    write_qwen(tmp_path / QWEN_NAME, 0, with_value(random_weights(), "W_enc", (3, 4), 1e5))
    suite = SAESuite.from_pretrained(tmp_path / QWEN_NAME)
    assert bool(suite.encoder_rows(0, [3]).W.isfinite().all())
    with pytest.raises(CheckpointError, match=r"`W_enc` of feature L0F3 in '.*' holds NaN or inf as torch.float16"):
        suite.encoder_rows(0, [3], dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_honoured(folder: Path, dtype: torch.dtype) -> None:
    suite, stored = SAESuite.from_pretrained(folder), random_weights(1)
    rows = suite.encoder_rows(1, [7, 3], dtype=dtype)
    assert torch.equal(rows.W, stored.W_enc[[7, 3]].to(dtype))
    assert torch.equal(rows.b, stored.b_enc[[7, 3]].to(dtype))
    assert torch.equal(suite.decoder_columns(1, [7, 3], dtype=dtype), stored.W_dec[:, [7, 3]].to(dtype))
    loaded = suite.load(1, dtype=dtype)
    for name, value in stored.four().items():
        assert torch.equal(loaded.get_buffer(name), value.to(dtype))


def test_encoder_alone_encodes_as_the_whole(folder: Path) -> None:
    suite = SAESuite.from_pretrained(folder)
    acts = suite.load(0, decoder=False).encode(residuals())
    assert torch.equal(acts.top_indices, suite.load(0).encode(residuals()).top_indices)


def test_no_features_give_empty_rows(folder: Path) -> None:
    suite = SAESuite.from_pretrained(folder)
    assert suite.encoder_rows(0, []).W.shape == (0, D_MODEL)
    assert suite.encoder_rows(0, []).b.shape == (0,)
    assert suite.decoder_columns(0, []).shape == (D_MODEL, 0)


def test_rows_outlive_their_file(folder: Path) -> None:
    rows = SAESuite.from_pretrained(folder).encoder_rows(0, [3])
    (folder / "layer0.sae.pt").write_bytes(b"")
    assert torch.equal(rows.W, random_weights(0).W_enc[[3]])


def test_fingerprint_is_that_of_the_encoder_bias(folder: Path, tmp_path: Path) -> None:
    expected = hashlib.sha256(random_weights(1).b_enc.numpy().astype("<f4").tobytes()).hexdigest()[:16]
    suite = SAESuite.from_pretrained(folder)
    assert suite.fingerprint(1) == expected
    assert suite.fingerprint(0) != expected
    halved = random_weights(1).to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        write_qwen(tmp_path / str(dtype), 1, halved.to(dtype))
    first, second = (SAESuite.from_pretrained(tmp_path / str(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert first.fingerprint(1) == second.fingerprint(1)


def test_suite_is_light_enough_to_copy_and_pickle(folder: Path) -> None:
    suite = SAESuite.from_pretrained(folder)
    suite.spec(0)
    assert copy.deepcopy(suite).spec(0) == suite.spec(0)
    assert pickle.loads(pickle.dumps(suite)).spec(0) == suite.spec(0)
    assert len(pickle.dumps(suite)) < 5000


def measured(code: str, *arguments: str) -> float:
    """By how many MB a process grows that had done the same on a small scale."""
    done = run_forked(code, *arguments, environment={"QSCOPE_TRL_KERNEL": "torch"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEASURE = """
import json, sys
from pathlib import Path
import torch
from qscope_trl.sae.suite import SAESuite

def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1000

def use(folder):
    suite = SAESuite.from_pretrained(folder, k=8)
    index = torch.linspace(0, suite.d_sae - 1, 10).long().tolist()
    return suite.spec(0), suite.fingerprint(0), suite.encoder_rows(0, index)

use(sys.argv[2])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
use(sys.argv[1])
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
def test_ten_features_of_a_large_file_cost_little_memory(tmp_path: Path) -> None:
    # 2 x 40 MB; rows of 1 KB, so that neighbours are not read along with them.
    write_qwen(tmp_path / "large", 0, random_weights(0, 256, 40_000))
    write_qwen(tmp_path / "small", 0, random_weights(0, 16, 32))
    assert (tmp_path / "large" / "layer0.sae.pt").stat().st_size > 80e6
    growth = measured(MEASURE, str(tmp_path / "large"), str(tmp_path / "small"))
    # Four rows are mapped at a time, up to 2 MiB around each where the page cache holds large folios.
    assert growth < 10, f"{growth} MB"


@pytest.mark.parametrize("format", ["qwen", "sparsify", "saelens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_encoder_equals_a_loaded_one(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = random_weights()
    if format == "qwen":
        write_qwen(tmp_path, 0, weights)
    elif format == "sparsify":
        write_sparsify(tmp_path / "layers.0", weights)
    else:
        write_saelens(tmp_path, weights, {"architecture": "topk", "k": K, "hook_name": "blocks.0.hook_resid_post"})
    suite = SAESuite.from_pretrained(tmp_path, k=K)
    mapped, loaded = (suite.load(0, dtype=dtype, decoder=False, mmap=mmap) for mmap in (True, False))
    assert mapped.W_enc.dtype == dtype
    assert torch.equal(mapped.W_enc, loaded.W_enc)
    assert torch.equal(mapped.b_enc, loaded.b_enc)


MEASURE_WHOLE = """
import json, sys
from pathlib import Path
import torch
from qscope_trl.sae.suite import SAESuite

def own():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000

x = torch.randn(4, 256)
SAESuite.from_pretrained(sys.argv[2], k=8).load(0, decoder=False).encode(x[:, :16])
before = own()
sae = SAESuite.from_pretrained(sys.argv[1], k=8).load(0, decoder=False, mmap=sys.argv[3] == "1")
sae.encode(x)
print(json.dumps(own() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures through Linux's /proc")
@pytest.mark.parametrize("format", ["qwen", "sparsify"])
def test_processes_of_a_node_share_a_mapped_encoder(format: str, tmp_path: Path) -> None:
    """Memory of the process's own, beside what it maps from files; the encoder has 41 MB."""
    large, small = random_weights(0, 256, 40_000), random_weights(0, 16, 32)
    if format == "qwen":
        write_qwen(tmp_path / "large", 0, large)
    else:
        write_sparsify(tmp_path / "large" / "layers.0", large, d_in=256, num_latents=40_000)
    write_qwen(tmp_path / "small", 0, small)
    growth = [measured(MEASURE_WHOLE, str(tmp_path / "large"), str(tmp_path / "small"), mmap) for mmap in ("1", "0")]
    # Encoding itself takes a few MB, in both.
    assert growth[0] < 15, f"{growth} MB"
    assert growth[1] > 40, f"{growth} MB"
