"""Rules over features: learning them from labelled texts, evaluating them beside baselines, the `rules` command."""
