"""Print how far the labels of `rules_train` and `rules_test` can be told without a language model, as Markdown.

Every number is of `rules_test`; what has to be chosen is chosen on `rules_train`. Needs scikit-learn and the package.
"""

from __future__ import annotations

import logging
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier
from transformers import AutoTokenizer

from qscope_trl.demo.assets import MODEL, rows

logger = logging.getLogger("label_baselines")

NAMES = {"basic": r"\b(basic|python)\b", "calc": r"\bcalc\b|spreadsheet", "writer": r"\bwriter\b"}


def cjk_share(text: str) -> float:
    """Return the Chinese characters' part of the letters."""
    return len(re.findall(r"[\u3400-\u9fff]", text)) / len(re.findall(r"[A-Za-z\u3400-\u9fff]", text))


def share_by_source(parts: list[dict], labels: list[bool]) -> dict[str, float]:
    """Return how often the label is true of each part of the help."""
    counts = Counter(row["source"] for row in parts)
    hits = Counter(row["source"] for row, label in zip(parts, labels, strict=True) if label)
    return {source: hits[source] / counts[source] for source in counts}


def one_number_table(train: list[dict], test: list[dict]) -> None:
    """Print AUROC of one number per text for language and switching, and F1 of the best interval for switching."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    measures: dict[str, Callable[[dict, dict[str, float]], float]] = {
        "length in characters": lambda row, _: len(row["text"]),
        "length in the bundled model's tokens": lambda row, _: len(tokenizer(row["text"])["input_ids"]),
        "length in UTF-8 bytes": lambda row, _: len(row["text"].encode()),
        "number of line breaks": lambda row, _: row["text"].count("\n"),
        "part of the help, as often as the label is true of it": lambda row, shares: shares[row["source"]],
        "share of Chinese characters": lambda row, _: cjk_share(row["text"]),
    }
    plain = [[row for row in part if not row["switched"]] for part in (train, test)]
    in_chinese = [[row["language"] == "zh" for row in part] for part in plain]
    switched = [[row["switched"] for row in part] for part in (train, test)]
    logger.info("| one number per text | Chinese or English, AUROC | switched, AUROC | switched, F1 of an interval |")
    logger.info("|---|---|---|---|")
    for name, measure in measures.items():
        shares = share_by_source(plain[0], in_chinese[0])
        language_auroc = roc_auc_score(in_chinese[1], [measure(row, shares) for row in plain[1]])
        shares = share_by_source(train, switched[0])
        train_values, test_values = ([[measure(row, shares)] for row in part] for part in (train, test))
        switched_auroc = roc_auc_score(switched[1], [value for (value,) in test_values])
        # Two cuts of one number: the tree's middle leaf is an interval.
        tree = DecisionTreeClassifier(max_leaf_nodes=3, class_weight="balanced", random_state=0)
        tree.fit(train_values, switched[0])
        interval_f1 = f1_score(switched[1], tree.predict(test_values))
        logger.info("| %s | %.3f | %.3f | %.3f |", name, language_auroc, switched_auroc, interval_f1)
    logger.info("| every text called switched | | | %.3f |", f1_score(switched[1], [True] * len(test)))


def source_table(train: list[dict], test: list[dict]) -> None:
    """Print how well words tell the part of the help, with and without the parts' names."""
    train, test = ([row for row in part if row["language"] == "en"] for part in (train, test))
    truth = [row["source"] for row in test]
    any_name = re.compile("|".join(NAMES.values()), re.IGNORECASE)
    num_named = sum(bool(any_name.search(row["text"])) for row in test)
    logger.info("\n%d of %d English texts of rules_test name a part.\n", num_named, len(test))
    logger.info("| part of the help, English texts | accuracy | macro F1 | macro AUROC |")
    logger.info("|---|---|---|---|")
    guesses = []
    for row in test:
        matches = [source for source, name in NAMES.items() if re.search(name, row["text"], re.IGNORECASE)]
        guesses.append(matches[0] if len(matches) == 1 else "shared")
    logger.info("| the part that is named, else `shared` | %s | |", scores(truth, guesses))
    for title, clean in (("words", str), ("words without the parts' names", lambda text: any_name.sub(" ", text))):
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
        model.fit([clean(row["text"]) for row in train], [row["source"] for row in train])
        texts = [clean(row["text"]) for row in test]
        auroc = roc_auc_score(truth, model.predict_proba(texts), multi_class="ovr", average="macro")
        logger.info(
            "| logistic regression on %s | %s | %.3f |", title, scores(truth, list(model.predict(texts))), auroc
        )


def scores(truth: list[str], guesses: list[str]) -> str:
    """Return accuracy and macro F1 as cells."""
    return f"{accuracy_score(truth, guesses):.3f} | {f1_score(truth, guesses, average='macro'):.3f}"


def main() -> None:
    """Print the tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    train, test = rows("rules_train"), rows("rules_test")
    for name, part in (("rules_train", train), ("rules_test", test)):
        lengths = [len(row["text"]) for row in part]
        size = f"{len(part)} rows of {len({row['page'] for row in part})} pages"
        spread = f"{min(lengths)} to {max(lengths)} characters, median {statistics.median(lengths):g}"
        logger.info("%s: %s, %s", name, size, spread)
        counts = Counter((row["source"], row["language"]) for row in part)
        for source in sorted({row["source"] for row in part}):
            logger.info("  %s: %s", source, {language: counts[source, language] for language in ("en", "zh", "mixed")})
    one_number_table(train, test)
    source_table(train, test)


if __name__ == "__main__":
    main()
