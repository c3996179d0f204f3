"""One arm of `qscope demo grpo`: reinforce the bundled model one way, and measure as it goes.

All arms see the same prompts in the same order and the same rule, which reads text: a rollout without Chinese and
without a loop gets 1, any other 0. They differ in the rollout policy alone; `rule-fast` has none and learns faster.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import set_seed
from trl import GRPOConfig

from qscope_trl.demo import assets
from qscope_trl.demo.arms import StepTimer, generate, load_model
from qscope_trl.demo.judge import judge
from qscope_trl.demo.recipe import GRPORecipe
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.residual import ResidualHook
from qscope_trl.monitor.detectors import is_loop, is_switched
from qscope_trl.sae.suite import SAESuite
from qscope_trl.training.grpo import SAEGRPOTrainer
from qscope_trl.training.opening import open_features
from qscope_trl.training.penalty import preact_hinge
from qscope_trl.training.rollouts import RolloutPolicy

ARMS = {
    "rule": "the rule alone",
    "rule-fast": "the rule alone, twice the learning rate",
    "amplify": "and amplify_negative, per token",
    "steered": "and steered_negative",
    "random": "and amplify_negative on matched random features",
}
"""The arms and what each is."""


def rule(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a rollout without Chinese and without a loop, else 0."""
    return [float(not is_switched(text) and not is_loop(text)) for text in completions]


def make_policy(arm: str, recipe: GRPORecipe, features: FeatureSet, control: FeatureSet) -> RolloutPolicy | None:
    """The rollout policy of an arm."""
    if arm in ("rule", "rule-fast"):
        return None
    if arm == "steered":
        return RolloutPolicy("steered_negative", features, assets.saes(), strength=recipe.steer_strength)
    chosen = control if arm == "random" else features
    return RolloutPolicy(
        "amplify_negative",
        chosen,
        assets.saes(),
        strength=recipe.strength,
        credit="token",
        feature_kind="topk_act",
    )


class Evaluation(TrainerCallback):  # type: ignore[misc]
    """Behaviour, text loss and held-out features before, during and after training, on texts not trained on."""

    def __init__(self, tokenizer: Any, recipe: GRPORecipe, watched: dict[str, FeatureSet]) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.curve: list[dict[str, float]] = []
        self.texts: list[str] = []
        self._texts = [row["prompt"] + row["completion"] for row in assets.rows("sft_validation")]
        self._watched = watched

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure every few steps."""
        if state.global_step % self.recipe.evaluate_every == 0:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        """Add a point to the curve; the training's random numbers go on as if nothing had happened."""
        before, training = torch.get_rng_state(), model.training
        self.texts = generate(model, self.tokenizer, self.recipe, seed=0)
        verdict = judge(self.texts)
        loss, features = self._read(model)
        self.curve.append(
            {
                "step": step,
                "rate": verdict.rate,
                "share": verdict.share,
                "loops": statistics.mean(map(is_loop, self.texts)),
                "loss": loss,
                **features,
            }
        )
        torch.set_rng_state(before)
        model.train(training)

    @torch.no_grad()
    def _read(self, model: Any) -> tuple[float, dict[str, float]]:
        """Loss per token of the validation text, and mean excess of the watched features there."""
        suite = SAESuite.from_pretrained(assets.saes())
        opened = {name: open_features(model, suite, s, (), "preact_hinge") for name, s in self._watched.items()}
        layers = sorted({layer for chosen in opened.values() for layer in chosen})
        total, tokens, excess = 0.0, 0, dict.fromkeys(opened, 0.0)
        model.eval()
        with ResidualHook(model, layers) as hook:
            for start in range(0, len(self._texts), 32):
                batch = self.tokenizer(
                    self._texts[start : start + 32], return_tensors="pt", padding=True, truncation=True,
                    max_length=self.recipe.max_length, padding_side="right",
                )  # fmt: skip
                with hook.listen() as captures:
                    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
                )
                total, tokens = total + float(loss), tokens + int((labels != -100).sum())
                for name, chosen in opened.items():
                    for layer, features in chosen.items():
                        terms = preact_hinge(captures[0].residuals[layer], features)
                        excess[name] += float(terms.penalty_BT[:, :-1][labels != -100].sum())
        return total / tokens, {name: value / tokens for name, value in excess.items()}


def run_arm(
    arm: str,
    seed: int,
    recipe: GRPORecipe,
    features: FeatureSet,
    control: FeatureSet,
    monitors: FeatureSet,
    folder: Path,
) -> dict[str, Any]:
    """Reinforce one arm with one seed and measure it.

    Args:
        arm: One of `ARMS`.
        seed: Of the order of prompts and of sampling.
        recipe: All settings.
        features: Used by the policies, measured in all arms.
        control: Used by the arm `random`.
        monitors: Measured in all arms, used in none.
        folder: Where the trainer may write.

    Returns:
        The curve of measurements, rewards and metrics of the policy step by step, seconds a step, generations.
    """
    set_seed(seed)
    model, tokenizer = load_model()
    timer = StepTimer()
    evaluation = Evaluation(tokenizer, recipe, {"features": features, "monitors": monitors})
    kept = recipe.prompt_tokens
    prompts = [tokenizer.decode(tokenizer(row["prompt"])["input_ids"][-kept:]) for row in assets.rows("sft_train")]
    rate = recipe.learning_rate * (recipe.fast_factor if arm == "rule-fast" else 1.0)
    trainer = SAEGRPOTrainer(
        model=model,
        reward_funcs=[rule],
        rollout_policy=make_policy(arm, recipe, features, control),
        args=_arguments(recipe, rate, seed, folder),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[timer, evaluation],
    )
    trainer.remove_callback(PrinterCallback)
    evaluation.measure(trainer.model, 0)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "arm": arm,
        "seed": seed,
        "curve": evaluation.curve,
        "generations": recipe.generations,
        "rewards": [entry["reward"] for entry in history],
        "policy": {key: [e[key] for e in history] for key in history[-1] if key.startswith("sae/rollouts/")},
        "step_seconds": statistics.median([e["step_time"] for e in history[2:]]) if len(history) > 2 else None,
        "samples": evaluation.texts[:8],
    }


def _arguments(recipe: GRPORecipe, learning_rate: float, seed: int, folder: Path) -> GRPOConfig:
    with warnings.catch_warnings():
        # transformers 5.23 renamed `gradient_checkpointing`; the old name works on every version supported.
        warnings.simplefilter("ignore", FutureWarning)
        return GRPOConfig(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            num_generations=recipe.num_generations,
            max_completion_length=recipe.new_tokens,
            temperature=recipe.temperature,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            beta=recipe.beta,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=seed,
        )
