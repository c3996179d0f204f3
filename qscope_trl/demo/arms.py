"""One arm of the demo: fine-tune the bundled model one way, generate, and measure.

All arms see the same data in the same order for the same steps. `plain` is TRL's SFTTrainer as it is; `penalty` adds
the callback; `random` the same callback on matched random features; `token` a penalty on the probability of Chinese
tokens, which needs no SAE.
"""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer

from qscope_trl.config.training import PenaltyConfig
from qscope_trl.demo import assets
from qscope_trl.demo.judge import judge, unwanted_tokens
from qscope_trl.demo.recipe import Recipe
from qscope_trl.features import FeatureSet
from qscope_trl.hooks.layers import find_decoder, find_layers
from qscope_trl.hooks.residual import ResidualHook
from qscope_trl.training.attach import attach
from qscope_trl.training.callback import SAEPenaltyCallback
from qscope_trl.training.masks import token_mask
from qscope_trl.training.normalisation import loss_divisor

ARMS = {
    "base": "no fine-tuning",
    "plain": "TRL's SFTTrainer",
    "penalty": "with SAEPenaltyCallback",
    "random": "the same on matched random features",
    "token": "penalty on Chinese tokens' probability",
}
"""The arms and what each is."""


class TokenPenaltyTrainer(SFTTrainer):  # type: ignore[misc]
    """SFT with `weight` times the mean probability of unwanted tokens: the plain alternative to a feature penalty."""

    token_weight: float
    unwanted_V: Tensor

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """SFT's loss plus the penalty, averaged over trained tokens as SFT's own."""
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        last = len(find_layers(self.model)) - 1
        batch = dict(inputs)
        with ResidualHook(self.model, [last]) as hook, hook.listen() as captures:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        capture = next(c for c in captures if c.has_grad)
        config = PenaltyConfig()
        mask_BT = token_mask(capture, batch, config)
        norm: Any = find_decoder(self.model).norm
        hidden = norm(capture.residuals[last][mask_BT])
        mass_T = self.model.get_output_embeddings()(hidden).softmax(-1)[:, self.unwanted_V].sum(-1)
        divisor = loss_divisor(self, torch.tensor(mass_T.numel()), kwargs.get("num_items_in_batch"), batch, config)
        return loss + self.token_weight * mass_T.sum() / divisor


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


def load_model() -> tuple[Any, Any]:
    """The bundled model in fp32 and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(assets.MODEL, dtype=torch.float32), tokenizer


def run_arm(
    arm: str, seed: int, recipe: Recipe, features: FeatureSet, control: FeatureSet, monitors: FeatureSet, folder: Path
) -> dict[str, Any]:
    """Fine-tune one arm with one seed and measure it.

    Args:
        arm: One of `ARMS`.
        seed: Of the data order and of sampling.
        recipe: All settings.
        features: Penalised in the arm `penalty`, measured in all.
        control: Penalised in the arm `random`.
        monitors: Measured in all arms, penalised in none.
        folder: Where the trainer may write.

    Returns:
        Code-switching rate and share of Chinese letters in the generations, validation loss, mean excess of the
        penalised and of the monitored features over their thresholds on the validation text, seconds a step, and a few
        generations.
    """
    set_seed(seed)
    model, tokenizer = load_model()
    timer, callbacks = StepTimer(), []
    if arm in ("penalty", "random"):
        chosen = features if arm == "penalty" else control
        # On random features the penalty may fall and the monitors stay; that is what the arm is for, no alarm.
        settings: dict[str, Any] = {} if arm == "penalty" else {"alarm": None}
        callbacks.append(
            SAEPenaltyCallback(assets.saes(), chosen, recipe.penalty_weight, monitor_features=monitors, **settings)
        )
    kind = TokenPenaltyTrainer if arm == "token" else SFTTrainer
    trainer = kind(
        model,
        args=_arguments(recipe, seed, folder),
        train_dataset=Dataset.from_list(assets.rows("sft_train")),
        eval_dataset=Dataset.from_list(assets.rows("sft_validation")),
        processing_class=tokenizer,
        callbacks=[timer, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if arm == "token":
        trainer.token_weight, trainer.unwanted_V = recipe.token_weight, unwanted_tokens(tokenizer)
    if arm != "base":
        trainer.train()
    with attach(trainer, assets.saes(), features, penalty_weight=0.0, monitor_features=monitors):
        measured = trainer.evaluate()
    texts = generate(trainer.model, tokenizer, recipe, seed)
    verdict = judge(texts)
    return {
        "arm": arm,
        "seed": seed,
        "rate": verdict.rate,
        "share": verdict.share,
        "generations": verdict.total,
        "validation_loss": measured["eval_loss"],
        "penalty": measured["eval_sae/penalty"],
        "monitor": measured["eval_sae/monitor/penalty"],
        "step_seconds": statistics.median(timer.seconds[2:]) if len(timer.seconds) > 2 else None,
        "penalty_curve": [e["sae/penalty"] for e in trainer.state.log_history if "sae/penalty" in e],
        "samples": texts[:8],
    }


def _arguments(recipe: Recipe, seed: int, folder: Path) -> SFTConfig:
    with warnings.catch_warnings():
        # transformers 5.23 renamed `gradient_checkpointing`; the old name works on every version supported.
        warnings.simplefilter("ignore", FutureWarning)
        return SFTConfig(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, recipe.steps // 10),
            weight_decay=0.0,
            max_length=recipe.max_length,
            gradient_checkpointing=False,
            logging_steps=max(1, recipe.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=seed,
        )


@torch.no_grad()
def generate(model: Any, tokenizer: Any, recipe: Recipe, seed: int, batch_size: int = 256) -> list[str]:
    """Sample continuations of the bundled prompts; the same seed draws from the same prompts in the same order."""
    prompts = [row["prompt"] for row in assets.rows("prompts")]
    prompts = [prompts[n % len(prompts)] for n in range(recipe.generations)]
    # Prompts of like length share a batch: less padding, and each batch runs as long as its longest.
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    model.eval()
    torch.manual_seed(seed)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[n] for n in places], return_tensors="pt", padding=True, truncation=True, max_length=64
        )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=recipe.new_tokens,
            do_sample=True,
            temperature=recipe.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        for n, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[n] = text
    return texts
