"""Where figures turn into words. Each threshold with where it comes from; docs/doctor.md tells them to users.

"The demo's SAEs" are those bundled with the package, read rightly and wrongly by benchmarks/doctor_mistakes.py, whose
tables are in benchmarks/results.
"""

FVU_DOUBTFUL = 0.4
"""Fraction unexplained above which a fit is doubtful: twice what was measured on SAEs of Qwen3.5-2B (0.200 on the base
model, 0.205 on the instruct version). The demo's SAEs leave 0.05 to 0.16."""

CHANCE_DOUBTFUL = 0.8
"""Share of the fraction unexplained of like noise from which on a fit is doubtful. The demo's SAEs leave 0.09 to 0.32
of it read rightly, up to 0.88 read wrongly."""

CHANCE_FAIL = 0.9
"""Share of it from which on an SAE does not fit: random SAEs, dead ones and those of another model leave 0.98 and
more."""

BETTER = 0.95
"""Another reading is better if it leaves at most this share of the variance that the stated one leaves. Both see the
same tokens, so noise is no concern; the margin is for what texts of another kind than the training data change."""

MUCH_BETTER = 0.8
"""Another reading that leaves at most this share (geometric mean over layers) is the right one. Where the demo's SAEs
are read wrongly, the right way leaves 0.39 to 0.73, k apart; read rightly, no other way leaves less than 0.99."""

SAME_FEATURES = 0.5
"""Mean Jaccard index of active features below which they count as others; at 0.5 two thirds of either set are
shared."""

ROUNDED_SAME = 0.9
"""The same index between an SAE and itself in another dtype. The demo's SAEs have 0.99 in bf16."""

UNALIGNED = 0.1
"""Mean cosine between encoder and decoder vectors below which they are not of the same features: the demo's SAEs have
0.66 to 0.84, unrelated vectors 0."""

SHORT = 0.05
"""Share of tokens with fewer than k positive pre-activations worth a word."""

SILENT = 0.3
"""Share of features that fire nowhere worth a word. It decides nothing: narrow texts leave many features silent."""

ENOUGH_FIRINGS = 20.0
"""Firings of a feature on average from which on silence says something: as a Poisson count, one in 5e8 is then 0."""

FEW_TOKENS = 200
"""Tokens below which no verdict rests on the figures."""

LEFT_OUT = 0.05
"""Share of tokens, beside the base model's outliers, that may have far larger norms on the tuned model: attention
sinks are a token or two of a text."""

UNIFORM = 8.0
"""Effective number of different tokens, 1 / sum of squared shares, below which figures say nothing against an SAE: so
few residuals recur that hardly any variance is left to explain, and any error is large beside it. In layers 1 and 4 of
the demo 8 different tokens in random order leave 0.15 and 0.34, as a fit does; 4 leave 0.30 and 0.49, 2 leave 0.57 and
0.85, one word again and again 80. 40 ordinary texts come to 175, single characters of English to 16."""
