"""SFT with a feature penalty on the bundled model: the README's ten lines, runnable as they are on a CPU."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qscope_trl import SAEPenaltyCallback
from qscope_trl.demo import assets

trainer = SFTTrainer(
    str(assets.MODEL),
    args=SFTConfig(
        output_dir="runs/example", max_steps=5, logging_steps=1, report_to="none", use_cpu=True, bf16=False
    ),
    train_dataset=Dataset.from_list(assets.rows("sft_train")[:64]),
    callbacks=[SAEPenaltyCallback(assets.saes(), ["L4F7", "L5F19"], penalty_weight=0.1, monitor_features=["L5F20"])],
)
trainer.train()
for entry in trainer.state.log_history:
    if "sae/penalty" in entry:
        print(f"loss {entry['loss']:.3f}  penalty {entry['sae/penalty']:.4f}")
