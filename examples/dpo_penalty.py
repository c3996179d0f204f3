"""The same callback in DPO with LoRA (needs `peft`): Chinese answers are rejected, and Chinese features cost too."""

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from qscope_trl import SAEPenaltyCallback
from qscope_trl.demo import assets

chosen, rejected = assets.rows("find_stay")[:32], assets.rows("find_switch")[:32]
rows = [
    {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
    for a, b in zip(chosen, rejected, strict=True)
]
trainer = DPOTrainer(
    str(assets.MODEL),
    args=DPOConfig(
        output_dir="runs/example", max_steps=3, logging_steps=1, report_to="none", use_cpu=True, bf16=False
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[SAEPenaltyCallback(assets.saes(), ["L4F7", "L5F19"], penalty_weight=0.1)],
)
trainer.train()
for entry in trainer.state.log_history:
    if "sae/penalty" in entry:
        print(f"loss {entry['loss']:.3f}  penalty {entry['sae/penalty']:.4f}")
