"""The page of a map: what each table says stands above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qscope_trl.analysis.evalmap.figures import Figure
from qscope_trl.analysis.evalmap.mapping import UNLIKE
from qscope_trl.analysis.evalmap.near import NearSets
from qscope_trl.analysis.evalmap.rankings import Interval
from qscope_trl.analysis.evalmap.table import FEW_PAIRS
from qscope_trl.config.evalmap import EvalmapConfig
from qscope_trl.monitor import html

if TYPE_CHECKING:
    from qscope_trl.analysis.evalmap.report import ListedPair
    from qscope_trl.analysis.evalmap.run import Mapped

_MOST_PAIRS = 200
_SHOWN = 600


def build_page(
    config: EvalmapConfig,
    result: Mapped,
    figures: Sequence[Figure],
    near: Sequence[ListedPair],
    train: Sequence[ListedPair],
) -> html.Html:
    """Everything between the title and the end of the page."""
    drawn = {figure.name: figure for figure in figures}
    parts = [_sets(result), _overlap(result, drawn)]
    if result.map.clusters is not None:
        parts.append(_clusters(config, result, drawn))
    parts.append(_coverage(result, drawn))
    if result.near:
        parts.append(_near("Near samples between sets", _NEAR, config, result.near, near))
    if result.train:
        parts.append(_near("Near training texts", _TRAIN, config, result.train, train))
    if result.scores is not None:
        parts.append(_scores(result, drawn))
    if not figures:
        parts.append(html.element("p", "No figures: Matplotlib is not installed.", class_="dim"))
    values = {name: value for name, value in asdict(config).items() if value not in (None, "", [])}
    parts.append(html.section("Settings", html.settings(values)))
    return html.joined(parts)


_NEAR = (
    "Of each set some samples were looked up among all samples of the others, and of the set itself. Near are those "
    "whose sets of active features have at least the Jaccard similarity of `near`. That is a hint: at the last token, "
    "texts that end alike may be near. Equal texts are counted apart, and the pairs show what share of one text's "
    "token n-grams the other has."
)
_TRAIN = (
    "Samples for which a training text is near, of all samples of the set. Read the share of n-grams: a training text "
    "that contains a sample and goes on is not near at the last token."
)


def _sets(result: Mapped) -> html.Html:
    header = ["set", "samples", "features", "R", "mean coverage", "halves", "own", "nearest", "overlap", "cluster"]
    rows = [
        [
            entry.name, entry.num_samples, entry.num_features, html.figure(entry.redundancy, 4), entry.mean_coverage,
            entry.half_overlap, entry.own, entry.nearest, entry.nearest_overlap, entry.cluster,
        ]
        for entry in result.map.sets
    ]  # fmt: skip
    text = (
        "features: those active in a sample or more. R: feature redundancy; it grows with samples over features. mean "
        "coverage: the mean of the coverage curve, R without that factor. halves: overlap of two random halves of "
        "the set, what two sets of one kind and of half its size share. own: share of its features that no other set "
        "has. nearest: the set that covers most of it, and how much."
    )
    unlike = [entry.name for entry in result.map.sets if entry.is_unlike]
    said = f"More than {UNLIKE:.0%} of the features are found in no other set: {', '.join(unlike) or 'none'}."
    return html.section("Sets", html.element("p", text), html.table(header, rows), html.element("p", said))


def _overlap(result: Mapped, drawn: dict[str, Figure]) -> html.Html:
    found, names = result.map.overlaps, result.map.names
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    pairs.sort(key=lambda pair: -found.of_smaller[pair])
    rows = [
        [
            names[i], names[j], int(found.shared[i, j]), float(found.of_row[i, j]), float(found.of_row[j, i]),
            float(found.of_smaller[i, j]), float(result.map.equal_overlaps[i, j]),
        ]
        for i, j in pairs[:_MOST_PAIRS]
    ]  # fmt: skip
    header = ["first", "second", "shared", "of first", "of second", "overlap_min", "at equal size"]
    text = (
        f"of first: share of the first set's features that the second has. at equal size: overlap_min of random "
        f"subsets of {result.map.equal_size} samples of both, so that size does not count."
    )
    return html.section(
        "Overlap", _figure(drawn, "overlaps"), html.element("p", text), html.table(header, rows) if rows else ""
    )


def _clusters(config: EvalmapConfig, result: Mapped, drawn: dict[str, Figure]) -> html.Html:
    groups: dict[int, list[str]] = {}
    for entry in result.map.sets:
        groups.setdefault(entry.cluster, []).append(entry.name)
    text = f"Average linkage over 1 - overlap_min, cut at a mean overlap of {config.cluster_overlap}."
    added = html.table(["set", "adds", "features so far"], [list(step) for step in result.map.marginal])
    return html.joined(
        [
            html.section(
                "Clusters",
                html.element("p", text),
                _figure(drawn, "clusters"),
                html.table(["cluster", "sets"], [[number, ", ".join(names)] for number, names in groups.items()]),
            ),
            html.section(
                "What each set adds", html.element("p", "Each time the set that adds most new features."), added
            ),
        ]
    )


def _coverage(result: Mapped, drawn: dict[str, Figure]) -> html.Html:
    rows = [
        [entry.name, subset.size, subset.size / entry.num_samples, subset.greedy, subset.random]
        for entry in result.map.sets
        for subset in entry.subsets
    ]
    header = ["set", "samples", "share of the set", "greedy", "random"]
    text = (
        "Share of the set's features that a subset covers: chosen greedily, which is at least 63 % of the best choice "
        "of its size, and in the mean over all random subsets, in closed form."
    )
    return html.section("Subsets", _figure(drawn, "coverage"), html.element("p", text), html.table(header, rows))


def _near(
    title: str, text: str, config: EvalmapConfig, found: Sequence[NearSets], listed: Sequence[ListedPair]
) -> html.Html:
    some = sorted((entry for entry in found if entry.near), key=lambda entry: (-entry.same_text, -entry.near))
    rows = [
        [entry.name, entry.other, entry.looked_up, entry.near, entry.near / entry.looked_up, entry.same_text]
        for entry in some
    ]
    header = ["set", "near to", "looked up", "near", "share", "of the same text"]
    body = html.table(header, rows) if rows else html.element("p", "None.")
    return html.section(title, html.element("p", text), body, *_examples(config, listed))


def _examples(config: EvalmapConfig, listed: Sequence[ListedPair]) -> Iterator[html.Html]:
    by_sets: dict[tuple[str, str], list[ListedPair]] = {}
    for pair in listed:
        by_sets.setdefault((pair.set, pair.other_set), []).append(pair)
    if not config.examples:
        return
    for (first, second), pairs in by_sets.items():
        shown: list[html.Html] = []
        for pair in pairs[: config.examples]:
            shares = ", ".join(html.figure(share, 2) for share in (pair.ngrams_in_other, pair.ngrams_of_other))
            line = (
                f"{pair.set} {pair.sample} and {pair.other_set} {pair.other_sample}: Jaccard "
                f"{pair.similarity:.3f}, share of {config.ngram}-grams {shares}"
            )
            shown.append(html.element("p", line + (", the same text" if pair.same_text else "")))
            for text in (pair.text,) if pair.same_text else (pair.text, pair.other_text):
                shown.append(html.element("div", _end(text), class_="text"))
        yield html.details(f"{first} and {second}: {len(pairs)} pairs listed in near.csv", *shown)


def _end(text: str | None) -> Any:
    """The end of a text, which is what the last token stands at."""
    if text is None:
        return html.element("span", "from a store; the text is not at hand", class_="dim")
    return text if len(text) <= _SHOWN else f"... {text[-_SHOWN:]}"


def _scores(result: Mapped, drawn: dict[str, Figure]) -> html.Html:
    scores = result.scores
    if scores is None:
        return html.Html("")
    redundancies = {entry.name: entry.redundancy for entry in result.map.sets}
    performance = [
        [name, html.figure(redundancies[name], 4), *_three(entry.interval), float(entry.error.max())]
        for name, entry in scores.performance.items()
    ]
    rankings = [
        [name, ranking.size, *_three(ranking.greedy), *_three(ranking.random)]
        for name, entries in scores.rankings.items()
        for ranking in entries
    ]
    shown = [
        ["Spearman of R and R_perf over sets", scores.redundancy_agreement],
        ["Pearson of overlap and score correlation", scores.overlap_agreement and scores.overlap_agreement.agreement],
        [f"the same, given {scores.given}", scores.partial_agreement and scores.partial_agreement.agreement],
    ]
    agreement = [[title, *_three(interval)] for title, interval in shown if isinstance(interval, Interval)]
    parts: list[Any] = [html.element("p", f"Scores of {scores.num_models} models; intervals of 95 % by bootstrap.")]
    if agreement:
        parts.append(html.table(["agreement", "value", "from", "to"], agreement))
    if scores.overlap_agreement is None:
        parts.append(html.element("p", f"{FEW_PAIRS.capitalize()}."))
    elif scores.given is not None and scores.partial_agreement is None:
        parts.append(html.element("p", f"Given {scores.given}: {FEW_PAIRS}."))
    parts += [_figure(drawn, "scores"), _figure(drawn, "scores_partial")]
    if performance:
        parts.append(html.table(["set", "R", "R_perf", "from", "to", "largest standard error of a size"], performance))
        header = ["set", "samples", "tau, greedy", "from", "to", "tau, random", "from", "to"]
        parts.append(
            html.element("p", "Kendall tau of the models' ranking by a subset against that by the whole set.")
        )
        parts.append(html.table(header, rankings))
    return html.section("Scores", *parts)


def _three(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def _figure(drawn: dict[str, Figure], name: str) -> html.Html:
    if name not in drawn:
        return html.Html("")
    shown = html.Html(drawn[name].inline)
    return html.element("figure", shown, html.element("figcaption", drawn[name].title))
