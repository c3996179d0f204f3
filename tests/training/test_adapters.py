"""Adapters trained with the penalty: right gradients, and a saved model that needs nothing of the package.

LoRA on layers above the penalised one is refused in `test_checks.py`; quantised models are in `test_quantised.py`.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qscope_trl import SAEPenaltyCallback, SAESuite
from qscope_trl.monitor.run_record import RECORD_FOLDER
from qscope_trl.training.used_features import USED_FILE
from tests.tiny import largest_relative_difference, reported_difference, tiny_model
from tests.training.adapters import METHODS, assert_nothing_of_ours, ids, logits, saved_tensors, trained
from tests.training.backbones import Make, backbone, sft, sft_terms
from tests.training.harness import GradientRecorder, record_batches, train
from tests.training.reference import gradients
from tests.training.test_backbones import TOLERANCE
from tests.training.test_equality import WEIGHT, checkpointing, feature_set, lora, suite

pytestmark = pytest.mark.pinned

__all__ = ["suite"]  # a fixture

MERGED_TOLERANCE = 1e-5
"""fp32: one product with a summed weight for two products; logits are of order 1. Seen: up to 2e-6."""


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder and trainer of a run with the penalty, and of the same run without."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"save_strategy": "steps", "save_steps": 3}
    ours = trained(folder / "ours", saes, request.param, **settings)
    plain = trained(folder / "plain", None, request.param, **settings)
    return folder, ours, plain


def test_saved_adapter_on_a_fresh_model_gives_the_trained_models_logits(pair: Any) -> None:
    folder, ours, plain = pair
    wanted = logits(ours.model)
    reloaded = PeftModel.from_pretrained(tiny_model(), folder / "ours")
    assert torch.equal(logits(reloaded), wanted)
    assert float((wanted - logits(plain.model)).abs().max()) > 1e-2, "the penalty changed nothing"
    assert float((wanted - logits(tiny_model())).abs().max()) > 1e-2


def test_merged_model_saved_and_loaded_gives_the_trained_models_logits(pair: Any, tmp_path: Path) -> None:
    folder, ours, _ = pair
    merged = PeftModel.from_pretrained(tiny_model(), folder / "ours").merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(merged))
    assert torch.allclose(logits(loaded), logits(ours.model), rtol=0, atol=MERGED_TOLERANCE)
    assert saved_tensors(tmp_path).keys() == {f"model.safetensors:{name}" for name in tiny_model().state_dict()}


@pytest.mark.parametrize("inner", ["", "checkpoint-3"])
def test_saved_folders_hold_the_tensors_of_a_plain_run_and_no_other(pair: Any, inner: str) -> None:
    folder, _, _ = pair
    ours, plain = (saved_tensors(folder / name / inner) for name in ("ours", "plain"))
    assert ours.keys() == plain.keys()
    assert all(ours[name].shape == plain[name].shape for name in plain)
    assert any(not torch.equal(ours[name], plain[name]) for name in plain)
    if not inner:
        files = [{path.name for path in (folder / name).iterdir()} for name in ("ours", "plain")]
        assert files[0] == files[1] | {RECORD_FOLDER, USED_FILE}


def test_no_hook_and_no_attribute_remains(pair: Any) -> None:
    _, ours, plain = pair
    assert_nothing_of_ours(ours, plain)


def test_trained_model_pickles(pair: Any) -> None:
    _, ours, plain = pair
    try:
        pickle.loads(pickle.dumps(plain.model))
    except AttributeError as err:
        pytest.skip(f"this TRL leaves models that cannot be read back, also without a callback: {err}")
    assert torch.equal(logits(pickle.loads(pickle.dumps(ours.model))), logits(ours.model))


def test_trained_model_deep_copies(pair: Any) -> None:
    _, ours, _ = pair
    # Its logits would prove little: TRL patches `forward`, and a deep copy's runs the original's modules.
    copied, original = copy.deepcopy(ours.model).state_dict(), ours.model.state_dict()
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[name], original[name]) for name in original)
    assert all(copied[name].data_ptr() != original[name].data_ptr() for name in original)


def test_saved_adapter_needs_no_package_in_another_process(saes: Path, tmp_path: Path) -> None:
    ours = trained(tmp_path / "ours", saes, "DoRA")
    tiny_model().save_pretrained(tmp_path / "base")
    torch.save(ids(), tmp_path / "ids.pt")
    code = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, "ours").eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load("ids.pt")).logits, "logits.pt")
assert not [name for name in sys.modules if name.startswith("qscope")]
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(ours.model))


# --- gradients -------------------------------------------------------------------------------------------------------


def assert_gradients(make: Make, suite: SAESuite, tmp_path: Path, settings: dict[str, Any], family: str) -> None:
    recorder = GradientRecorder()
    trainer = sft(make(), [SAEPenaltyCallback(suite, feature_set(), WEIGHT), recorder], tmp_path, **settings)
    batches = record_batches(trainer)
    train(trainer)
    model = make()  # the same seeds, untouched by any trainer
    assert len(recorder.steps) == 2
    for found, window in zip(recorder.steps, (batches[:4], batches[4:]), strict=True):
        terms = sft_terms(family, model, window, 0.0)
        wanted = gradients(model, terms.task + terms.penalty)
        assert reported_difference(found, wanted) < TOLERANCE
        assert largest_relative_difference(gradients(model, terms.task), wanted) > 0.05


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_adapters_equal_autograd(method: str, reentrant: bool, suite: SAESuite, tmp_path: Path) -> None:
    def make() -> Any:
        return lora(backbone("qwen3"), **METHODS[method])

    kinds = {name.split(".default")[0].rsplit(".", 1)[-1] for name, p in make().named_parameters() if p.requires_grad}
    assert ("lora_magnitude_vector" in kinds) == (method == "DoRA")
    assert_gradients(make, suite, tmp_path, checkpointing(reentrant), "qwen3")


def test_gradients_of_dora_on_linear_attention_equal_autograd(suite: SAESuite, tmp_path: Path) -> None:
    def make() -> Any:
        return lora(backbone("qwen3_5_text"), target_modules=["in_proj_qkv", "out_proj", "v_proj"], use_dora=True)

    assert_gradients(make, suite, tmp_path, checkpointing(False), "qwen3_5_text")
