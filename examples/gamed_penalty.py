"""A penalty that is gamed, what shows it, and the same job with safeguards; on the bundled model, on a CPU.

The job is the demo's: fine-tune on clean English, so that the habit of going on in Chinese goes away. The first run
penalises one feature of the first layer, far too strongly. It is silent after a few steps, and the habit is where it
would be without a penalty. The second run puts a moderate penalty on features of the last two layers. Both are
watched: by features that are in neither penalty, by a drift probe, and by a detector that reads generated text.
Figures of several seeds: docs/safeguards.md.
"""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qscope_trl import DriftMonitor, Feature, FeatureDashboard, FeatureId, FeatureSet, SAEPenaltyCallback
from qscope_trl.demo import assets

STEPS = 60


def chosen(thresholds: dict[str, float]) -> FeatureSet:
    """Features of Chinese text that `qscope find` ranks first, with their mean pre-activations on English text."""
    ids = {FeatureId.parse(name): mean for name, mean in thresholds.items()}
    return FeatureSet(features=tuple(Feature(layer=i.layer, index=i.index, threshold=t) for i, t in ids.items()))


ONE_EARLY_FEATURE = chosen({"L0F124": -3.58})
LAST_LAYERS = chosen(
    {"L4F1740": -9.46, "L4F493": -6.8, "L4F1271": -4.57, "L4F270": -6.75, "L4F664": -4.79,
     "L5F23": -7.31, "L5F1554": -6.29, "L5F1444": -9.77, "L5F665": -6.77, "L5F2025": -5.96}
)  # fmt: skip
HELD_OUT = chosen({"L3F740": -4.93, "L3F1073": -4.09, "L3F1010": -4.71, "L3F169": -3.77, "L3F839": -4.87})

probe = [row["text"] for name in ("monitor_en", "monitor_zh") for row in assets.rows(name)[:6]]
prompts = [row["prompt"] for row in assets.rows("prompts")[:64]]


def train(name: str, features: FeatureSet, weight: float) -> None:
    """One run; what it warns of goes to stderr."""
    trainer = SFTTrainer(
        str(assets.MODEL),
        args=SFTConfig(
            output_dir=f"runs/{name}", max_steps=STEPS, per_device_train_batch_size=16, learning_rate=5e-4,
            max_length=128, logging_steps=max(1, STEPS // 10), save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, bf16=False, seed=0,
        ),
        train_dataset=Dataset.from_list(assets.rows("sft_train")),
        callbacks=[
            SAEPenaltyCallback(assets.saes(), features, weight, monitor_features=HELD_OUT),
            DriftMonitor(probe, assets.saes(), layers=(0, 3, 4, 5), every=max(1, STEPS // 10)),
            FeatureDashboard(prompts, probe, behaviour="chinese", every=max(1, STEPS // 4), num_samples=64,
                             max_new_tokens=48, batch_size=32),
        ],
    )  # fmt: skip
    trainer.train()
    worst = features.layers[0]
    for entry in trainer.state.log_history:
        if "sae/penalty" in entry:
            print(f"{name} step {entry['step']}  penalty {entry['sae/penalty']:.4f}  "
                  f"monitors {entry['sae/monitor/penalty']:.2f}  alarm {entry['sae/alarm']:.0f}")  # fmt: skip
        elif "sae/text/rate" in entry:
            print(f"{name} step {entry['step']}  text {100 * entry['sae/text/rate']:.0f} %")
        elif f"sae/drift/L{worst}/fvu" in entry:
            print(f"{name} step {entry['step']}  fvu of layer {worst}: {entry[f'sae/drift/L{worst}/fvu']:.3f}")


train("gamed", ONE_EARLY_FEATURE, 5.0)
train("moderate", LAST_LAYERS, 0.05)
