"""Rollout scores: equal to a fresh forward, at the promised number of forwards, and nothing left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from qscope_trl import FeatureReward
from qscope_trl.errors import PenaltySelfCheckError
from qscope_trl.training.scores import RolloutScoring
from tests.tiny import K, tiny_model, tiny_tokenizer
from tests.training.harness import train
from tests.training.rollout_harness import (
    FEATURES,
    Recorder,
    features,
    fresh_values,
    grpo_trainer,
    token_scores,
)
from tests.training.test_equality import lora

TOLERANCE = 2e-6
"""Relative; fp32, another order of the same sums because of padding and batching."""


def reward(saes: Path, **settings: Any) -> FeatureReward:
    return FeatureReward(features(), saes, sae_k=K, **settings)


class FullForwards:
    """Counts rows of whole-rollout forwards without gradient, outside the package's own counting."""

    def __init__(self, *models: Any) -> None:
        self.rows = 0
        for model in models:
            model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if not torch.is_grad_enabled() and not kwargs.get("use_cache", False):
            self.rows += ids.shape[0]


SETTINGS = {
    # name: (model, reader, GRPO settings, forwards of ours per generation)
    "policy, old log-probabilities": ("full", "policy", {"num_iterations": 2}, 0),
    "policy, aligned": ("full", "policy", {}, 1),
    "frozen, full, reference model": ("full", "frozen", {"beta": 0.1}, 0),
    "frozen, LoRA, reference pass": ("lora", "frozen", {"beta": 0.1}, 0),
    "frozen, LoRA, no reference pass": ("lora", "frozen", {}, 1),
    "frozen, LoRA, old log-probabilities do not count": ("lora", "frozen", {"num_iterations": 2}, 1),
    "policy, LoRA, both passes": ("lora", "policy", {"num_iterations": 2, "beta": 0.1}, 0),
    "frozen, LoRA trained further, TRL's copy": ("adapted", "frozen", {"beta": 0.1}, 0),
    "steps per generation": ("full", "policy", {"steps_per_generation": 2, "max_steps": 4}, 0),
}


def disturb(model: Any) -> None:
    """Make the policy differ from the model it started from."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora" not in name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def saved(tmp_path: Path) -> Any:
    """A model on disk: TRL loads its reference model from where the policy came from."""
    folder = tmp_path / "model"
    if not folder.is_dir():
        tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def new_adapter() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def twin(trainer: Any, kind: str) -> Any:
    """The trainer's weights in another model; a deep copy of what TRL patched would run the original's modules."""
    other = {
        "full": tiny_model,
        "adapted": lambda: lora(tiny_model()),
        "lora": lambda: get_peft_model(tiny_model(), new_adapter()),
    }[kind]()
    other.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if ".ref." not in k})
    return other


def start(kind: str, tmp_path: Path, rewards: list[Any], changes: dict[str, Any]) -> Any:
    if kind == "lora":
        return grpo_trainer(tmp_path, rewards, model=saved(tmp_path), peft_config=new_adapter(), **changes)
    model = lora(saved(tmp_path)) if kind == "adapted" else saved(tmp_path)
    return grpo_trainer(tmp_path, rewards, model=model, **changes)


@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_equal_a_fresh_forward_and_forwards_are_counted(setting: str, saes: Path, tmp_path: Path) -> None:
    kind, reader, changes, own = SETTINGS[setting]
    recorder = Recorder()
    trainer = start(kind, tmp_path, [recorder, reward(saes, reader=reader)], changes)
    frozen = tiny_model()
    if kind == "adapted":
        if "ref" not in trainer.model.peft_config:
            pytest.skip("this TRL keeps no copy of a given adapter, so its reference has all adapters off")
        frozen = lora(tiny_model())
        frozen.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if ".ref." not in k})
    disturb(trainer.model)
    wanted_model = frozen if reader == "frozen" else twin(trainer, kind)
    references = [trainer.ref_model] if trainer.ref_model is not None else []
    counted = FullForwards(trainer.model, *references)
    plain = start(kind, tmp_path, [Recorder()], changes)
    baseline = FullForwards(plain.model, *([plain.ref_model] if plain.ref_model is not None else []))
    train(trainer)
    train(plain)
    rows = sum(len(call["completion_ids"]) for call in recorder.calls)
    assert rows > 0
    assert RolloutScoring.of(trainer).num_forwards == own * len(recorder.calls)
    assert counted.rows - baseline.rows == own * rows
    tokenizer = tiny_tokenizer()
    # Weights do not move (learning rate 0): every generation saw the same models.
    for call in recorder.calls:
        for prompt, completion, scores in zip(
            call["prompts"], call["completion_ids"], call["sae_activations"], strict=True
        ):
            found = scores["feature_reward"]
            assert found.ids == features().ids
            wanted = fresh_values(wanted_model, tokenizer(prompt).input_ids, completion)
            assert found.values_CS.shape == (len(completion), len(FEATURES))
            assert float((found.values_CS - wanted).abs().max() / wanted.abs().max()) < TOLERANCE
            assert torch.allclose(found.score_C, token_scores(wanted), atol=1e-5)
            assert found.generated_C.all()


def test_reading_the_other_model_would_be_noticed(saes: Path, tmp_path: Path) -> None:
    """The test above can fail: policy and frozen model differ by far more than its tolerance."""
    policy = lora(tiny_model())
    disturb(policy)
    ids, completion = [3, 4], [5, 6, 7]
    moved = fresh_values(policy, ids, completion)
    with policy.disable_adapter():
        base = fresh_values(policy, ids, completion)
    assert float((moved - base).abs().max() / base.abs().max()) > 1e-2


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_remains_and_rows_are_not_changed(saes: Path, tmp_path: Path) -> None:
    during: list[int] = []

    def counting(completion_ids: list[list[int]], **_: Any) -> list[float]:
        during.append(hook_count(trainer.model))
        return [0.0] * len(completion_ids)

    recorder = Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, counting, reward(saes, reader="policy")])
    generated: list[list[dict[str, Any]]] = []
    generate = trainer._generate

    def watch(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        during.append(hook_count(trainer.model))
        return generate(prompts, *args, **kwargs)

    trainer._generate = watch
    score = trainer._generate_and_score_completions

    def keep(rows: Any) -> Any:
        generated.append([dict(row) for row in rows])
        output = score(rows)
        assert rows == generated[-1]
        during.append(hook_count(trainer.model))
        return output

    trainer._generate_and_score_completions = keep
    before = hook_count(trainer.model)
    train(trainer)
    # Before generation, while rewards are computed, and afterwards: hooks are there only while rollouts are read.
    assert during == [before] * 6
    assert hook_count(trainer.model) == before
    assert RolloutScoring.of(trainer).scores[0] is not None
    # Reward functions see the dataset's columns as they are; what is ours comes beside them.
    for call, rows in zip(recorder.calls, generated, strict=True):
        assert call["number"] == [row["number"] for row in rows]
        assert call["prompts"] == [row["prompt"] for row in rows]


def test_no_hook_remains_after_an_error(saes: Path, tmp_path: Path) -> None:
    def failing(**_: Any) -> list[float]:
        raise RuntimeError("reward broke")

    trainer = grpo_trainer(tmp_path, [failing, reward(saes, reader="policy")])
    before = hook_count(trainer.model)
    with pytest.raises(RuntimeError, match="reward broke"):
        train(trainer)
    assert hook_count(trainer.model) == before


def test_the_log_says_where_scores_come_from(saes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qscope_trl"):
        train(grpo_trainer(tmp_path, [reward(saes, reader="policy")]))
        train(grpo_trainer(tmp_path, [reward(saes, reader="policy")], num_iterations=2))
    said = [r.message for r in caplog.records if "rollouts are scored" in r.message]
    assert said == [
        "qscope_trl: rollouts are scored on the policy model by one more forward a generation.",
        "qscope_trl: rollouts are scored on the policy model by a forward TRL makes anyway.",
    ]


@pytest.mark.parametrize("num_iterations", [1, 2], ids=["own forward", "TRL's forward"])
def test_truncated_completions_whose_attention_is_masked_get_none(
    num_iterations: int, saes: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    trainer = grpo_trainer(
        tmp_path,
        [recorder, reward(saes, reader="policy")],
        num_iterations=num_iterations,
        mask_truncated_completions=True,
    )
    train(trainer)
    call = recorder.calls[0]
    truncated = [ids[-1] not in (0, 1) for ids in call["completion_ids"]]
    assert any(truncated)
    assert [scores is None for scores in call["sae_activations"]] == truncated


class ToolTrainer(GRPOTrainer):  # type: ignore[misc]
    """Generates as TRL does, and says that the second token of every completion came from a tool."""

    def _generate(self, prompts: Any, *args: Any) -> Any:
        output = list(super()._generate(prompts, *args))
        output[2] = [[int(n != 1) for n in range(len(ids))] for ids in output[1]]
        return tuple(output)


@pytest.mark.skipif("not __import__('trl').__version__ >= '1.'", reason="TRL before 1.0 knows no tool mask")
def test_tool_results_are_not_scored(saes: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    train(grpo_trainer(tmp_path, [recorder, reward(saes, reader="policy")], kind=ToolTrainer))
    masks = [s["feature_reward"].generated_C.tolist() for s in recorder.calls[0]["sae_activations"]]
    assert masks == [[n != 1 for n in range(len(ids))] for ids in recorder.calls[0]["completion_ids"]]


class ForeignEngine(GRPOTrainer):  # type: ignore[misc]
    """Completions come from elsewhere, as with vLLM: the model that is read never generated them."""

    def _generate(self, prompts: Any, *args: Any) -> Any:
        output = list(super()._generate(prompts, *args))
        output[1] = [[7 + n % 5, 8, 9, 1][: 2 + n % 3] for n in range(len(prompts))]
        return tuple(output)


def test_rollouts_of_another_engine_are_scored(saes: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, reward(saes, reader="policy")], kind=ForeignEngine)
    policy = twin(trainer, "full")
    train(trainer)
    call = recorder.calls[0]
    for prompt, completion, scores in zip(
        call["prompts"], call["completion_ids"], call["sae_activations"], strict=True
    ):
        wanted = fresh_values(policy, tiny_tokenizer()(prompt).input_ids, completion)
        found = scores["feature_reward"].values_CS
        assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


def test_evaluation_scores_too(saes: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, reward(saes, reader="policy")])
    trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert all(scores is not None for scores in recorder.calls[0]["sae_activations"])
    assert hook_count(trainer.model) == hook_count(tiny_model())


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_scores_are_those_of(model: Any, call: dict[str, Any]) -> None:
    for prompt, completion, scores in zip(
        call["prompts"], call["completion_ids"], call["sae_activations"], strict=True
    ):
        wanted = fresh_values(model, tiny_tokenizer()(prompt).input_ids, completion)
        found = scores["feature_reward"].values_CS
        assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("reader", "changes", "own"),
    [
        ("policy", {}, 1),
        ("policy", {"num_iterations": 2}, 0),
        # TRL compiles the reference model, so its pass is not read.
        ("frozen", {"beta": 0.1}, 1),
    ],
)
def test_scores_are_right_with_torch_compile(
    reader: str, changes: dict[str, Any], own: int, saes: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1}
    trainer = start("full", tmp_path, [recorder, reward(saes, reader=reader)], {**changes, **compiled})
    disturb(trainer.model)
    policy = twin(trainer, "full")
    train(trainer)
    assert "OptimizedModule" in type(trainer.model_wrapped).__name__
    assert ("OptimizedModule" in type(trainer.ref_model).__name__) == (reader == "frozen")
    assert RolloutScoring.of(trainer).num_forwards == own
    assert_scores_are_those_of(tiny_model() if reader == "frozen" else policy, recorder.calls[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_model_compiled_before_there_were_hooks_is_read_uncompiled(way: str, saes: Path, tmp_path: Path) -> None:
    model = tiny_model()
    if way == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    recorder = Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, reward(saes, reader="policy")], model=model)
    # As a training step does, without its backward.
    trainer._generate_and_score_completions([{"prompt": f"w{n} w7"} for n in (2, 2, 3, 3)])
    assert_scores_are_those_of(tiny_model(), recorder.calls[0])
    assert hook_count(trainer.model) == 0


def test_a_forward_that_shows_no_rollout_is_refused(saes: Path, tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, [reward(saes, reader="policy")])
    decoder = trainer.model.get_decoder()

    class Unhooked(type(decoder)):  # type: ignore[misc]
        """Runs no hooks, as a model compiled ahead of time."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    decoder.__class__ = Unhooked
    before = hook_count(trainer.model)
    with pytest.raises(PenaltySelfCheckError, match=r"showed 0 of 4 rollouts: the hooks did not fire"):
        train(trainer)
    assert hook_count(trainer.model) == before


# --- other engines and trainers --------------------------------------------------------------------------------------


def test_rloo_scores_from_its_own_pass(saes: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = grpo_trainer(tmp_path, [recorder, reward(saes, reader="policy")], kind=RLOOTrainer, config=RLOOConfig)
    policy = twin(trainer, "full")
    train(trainer)
    assert RolloutScoring.of(trainer).num_forwards == 0
    call = recorder.calls[0]
    prompt = tiny_tokenizer()(call["prompts"][0]).input_ids
    wanted = fresh_values(policy, prompt, call["completion_ids"][0])
    found = call["sae_activations"][0]["feature_reward"].values_CS
    assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


def test_a_monitor_leaves_the_rewards_as_they_are(saes: Path, tmp_path: Path) -> None:
    """A rollout that no reward scores stays without one, also when features are measured beside it."""

    def half(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if n % 2 else float(sum(ids) % 7) for n, ids in enumerate(completion_ids)]

    trained: list[dict[str, Any]] = []
    for rewards in ([half], [half, reward(saes, reader="policy", scale=0.0)]):
        torch.manual_seed(0)
        trainer = grpo_trainer(tmp_path, rewards, max_steps=1)
        original = trainer._generate_and_score_completions

        def watch(inputs: Any, original: Any = original) -> Any:
            trained.append(original(inputs))
            return trained[-1]

        trainer._generate_and_score_completions = watch
        train(trainer)
    assert torch.equal(trained[0]["advantages"], trained[1]["advantages"])
    assert trained[0]["advantages"].any()
