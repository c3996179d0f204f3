"""The bundled labelled sets: labels are true of the texts, training and test are apart, lengths tell nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.bundled import data_path
from qscope_trl.demo.assets import rows

HELP = "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text/"
SOURCES = ("basic", "calc", "shared", "writer")
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
ENGLISH_CLAUSE = re.compile(r"(?:\b[A-Za-z][A-Za-z0-9_'-]*[ ,]+){4}[A-Za-z]")
WORDS = ("table", "column", "window", "option", "record", "filter", "border", "margin", "header", "footer", "index")
SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_assets" / "make_data.py"


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict[str, Any]]]:
    return {name: rows(f"rules_{name}") for name in ("train", "test")}


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[\u3400-\u9fff]", text.lower())


def sequences(text: str) -> set[str]:
    words = tokens(text)
    return {" ".join(words[start : start + 8]) for start in range(len(words) - 7)}


def auroc(positive: list[float], negative: list[float]) -> float:
    """Probability that a positive has the larger value, ties half: by counting pairs."""
    return sum((p > n) + 0.5 * (p == n) for p, n in product(positive, negative)) / (len(positive) * len(negative))


@pytest.mark.parametrize("name", ["train", "test"])
def test_rows_are_well_formed_and_their_labels_agree(sets: dict[str, Any], name: str) -> None:
    for row in sets[name]:
        assert list(row) == ["text", "language", "switched", "source", "page"]
        assert row["language"] in {"en", "zh", "mixed"}
        assert row["switched"] is (row["language"] == "mixed")
        assert 100 <= len(row["text"]) <= 300
        assert row["text"] == row["text"].strip()
        assert row["text"].replace("\n", "").isprintable()
        folder = {"basic": "sbasic", "calc": "scalc", "shared": "shared", "writer": "swriter"}[row["source"]]
        assert row["page"].startswith(f"{folder}/")


def test_both_sets_stay_small() -> None:
    sizes = [Path(data_path(f"demo:rules_{name}")).stat().st_size for name in ("train", "test")]
    assert sum(sizes) < 250_000


@pytest.mark.parametrize(("name", "num_english"), [("train", 75), ("test", 45)])
def test_labels_are_balanced(sets: dict[str, Any], name: str, num_english: int) -> None:
    counts = Counter((row["source"], row["language"]) for row in sets[name])
    by_language = Counter(row["language"] for row in sets[name])
    assert all(counts[source, "en"] == num_english for source in SOURCES)
    # The part of the help says nothing between Chinese and mixed, and the scarcest has enough of both to be counted.
    assert all(counts[source, "zh"] == counts[source, "mixed"] >= 16 for source in SOURCES)
    assert all(0.25 < number / len(sets[name]) < 0.45 for number in by_language.values())


@pytest.mark.parametrize("name", ["train", "test"])
def test_switched_texts_have_both_scripts_and_others_one(sets: dict[str, Any], name: str) -> None:
    for row in sets[name]:
        text = row["text"]
        num_chinese = len(CHINESE.findall(text))
        latin = sum(character.isascii() and character.isalpha() for character in text)
        if row["language"] == "en":
            assert not re.search(r"[\u2e80-\u9fff\uff00-\uffef]", text), text
            assert latin > 0.5 * len(text), text
        elif row["language"] == "zh":
            assert num_chinese >= 30, text
            assert num_chinese >= latin, text
            assert not ENGLISH_CLAUSE.search(text), text
        else:
            assert num_chinese >= 15, text
            assert ENGLISH_CLAUSE.search(text), text
            assert not CHINESE.search(re.split(r"(?<=[.!?:\n])", text, maxsplit=1)[0]), text


@pytest.mark.parametrize("name", ["train", "test"])
def test_about_half_of_switched_texts_return_to_english(sets: dict[str, Any], name: str) -> None:
    switched = [row["text"] for row in sets[name] if row["switched"]]
    returned = [bool(re.search(r"[A-Za-z]{3}", re.split(r"[\u3400-\u9fff]", text)[-1])) for text in switched]
    assert 0.4 < sum(returned) / len(returned) < 0.65


def test_training_and_test_come_from_other_pages_by_the_split_of_the_bundled_data(sets: dict[str, Any]) -> None:
    def percent(page: str) -> int:
        return int(hashlib.sha256((HELP + page).encode()).hexdigest(), 16) % 100

    assert all(percent(row["page"]) < 18 for row in sets["train"])
    assert all(18 <= percent(row["page"]) < 26 for row in sets["test"])


@pytest.mark.parametrize("known", ["rules_train", "find_en", "find_zh", "find_switch", "find_stay", "sft_train"])
def test_test_texts_share_next_to_nothing_with_what_is_found_and_trained_on(sets: dict[str, Any], known: str) -> None:
    others = ["".join(str(row.get(key, "")) for key in ("text", "prompt", "completion")) for row in rows(known)]
    seen = set().union(*map(sequences, others))
    shares = [len(own & seen) / len(own) for row in sets["test"] if (own := sequences(row["text"]))]
    assert len(shares) == len(sets["test"])
    assert max(shares) <= 0.1
    assert sum(shares) / len(shares) < 0.01
    assert not {row["text"] for row in sets["test"]} & set(others)


@pytest.mark.parametrize("name", ["train", "test"])
def test_no_text_of_a_set_is_part_of_another(sets: dict[str, Any], name: str) -> None:
    texts = [row["text"] for row in sets[name]]
    everything = "\x00".join(texts)
    assert all(everything.count(text) == 1 for text in texts)


@pytest.mark.parametrize("name", ["train", "test"])
def test_length_tells_no_label(sets: dict[str, Any], name: str) -> None:
    lengths: dict[tuple[str, str], list[float]] = {}
    for row in sets[name]:
        lengths.setdefault((row["language"], row["source"]), []).append(len(row["text"]))

    def of(*languages: str) -> list[float]:
        return [length for (language, _), group in lengths.items() if language in languages for length in group]

    questions = {"language": (of("zh"), of("en")), "switched": (of("mixed"), of("en", "zh"))}
    questions |= {f"switched against {other}": (of("mixed"), of(other)) for other in ("en", "zh")}
    for source in SOURCES:
        rest = [length for other in SOURCES if other != source for length in lengths["en", other]]
        questions[source] = (lengths["en", source], rest)
    for question, (positive, negative) in questions.items():
        # By chance alone the smallest group, 45 against 135, would be off by 0.05 as its standard deviation.
        assert abs(auroc(positive, negative) - 0.5) < 0.02, question


@pytest.mark.parametrize("name", ["train", "test"])
def test_the_part_of_the_help_hardly_tells_language_or_switching(sets: dict[str, Any], name: str) -> None:
    for positive, negatives in (("zh", {"en"}), ("mixed", {"en", "zh"})):
        ours = Counter(row["source"] for row in sets[name] if row["language"] == positive)
        theirs = Counter(row["source"] for row in sets[name] if row["language"] in negatives)
        odds = {source: ours[source] / theirs[source] for source in SOURCES}
        assert auroc([odds[s] for s in ours.elements()], [odds[s] for s in theirs.elements()]) < 0.6


@pytest.fixture(scope="module")
def make_data() -> Any:
    specification = importlib.util.spec_from_file_location("make_data", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def page(number: int, same: int = 0) -> dict[str, Any]:
    """An invented page of eight paragraphs with one or two sentences, each with a number and words of its own.

    Args:
        number: The page's name.
        same: Where all pages' words begin with this page's number instead, there is text that pages have in common.
    """
    paragraphs = []
    for index in range(8):
        ids = [f"{number}x{index}x{part}" for part in range(1 + index % 2)]
        chosen = random.Random(f"{same or number} {index}")
        words = " ".join(chosen.choice(WORDS) for _ in range(8))
        characters = "".join(chr(chosen.randrange(0x4E00, 0x9000)) for _ in range(24))
        english = " ".join(f"The command number {i} opens {words}." for i in ids)
        chinese = "".join(f"编号为 {i} 的{characters}。" for i in ids)
        paragraphs.append([english, chinese if index != 5 else ""])
    return {"doc": f"{HELP}scalc/{number}.html", "source": "libreoffice-help-en-us", "paragraphs": paragraphs}


def test_labelled_texts_are_whole_sentences_of_one_page_and_no_sentence_comes_twice(make_data: Any) -> None:
    pages = [page(number) for number in range(30)]
    wanted = {"calc": {"zh": 10, "mixed": 10, "en": 10}}
    made = make_data.labelled(pages, wanted, set(), random.Random(1))
    assert json.dumps(made) == json.dumps(make_data.labelled(pages, wanted, set(), random.Random(1)))
    assert Counter(row["language"] for row in made) == Counter(wanted["calc"])
    seen: Counter[tuple[str, str]] = Counter()
    for row in made:
        written = []
        for language, pattern in (
            ("en", r"The command number (\S+) opens[^.]*\."),
            ("zh", r"编号为 (\S+) 的[^。]*。"),
        ):
            for match in re.finditer(pattern, row["text"]):
                written.append((match.start(), match.end(), match.group(1), language))
        written.sort()
        between = [row["text"][left[1] : right[0]] for left, right in pairwise(written)]
        assert set(between) <= {"", " ", "\n"}
        assert (written[0][0], written[-1][1]) == (0, len(row["text"]))
        ids = [tuple(map(int, identity.split("x"))) for _, _, identity, _ in written]
        assert ids == sorted(ids)
        assert len({identity[0] for identity in ids}) == 1
        assert row["page"] == f"scalc/{ids[0][0]}.html"
        languages = "".join(language[0] for *_, language in written)
        assert re.fullmatch({"en": "e+", "zh": "z+", "mixed": "e+z+e*"}[row["language"]], languages)
        seen.update((identity, language) for _, _, identity, language in written)
    assert set(seen.values()) == {1}


def test_texts_known_from_other_pages_and_damaged_ones_are_left_out(make_data: Any) -> None:
    pages = [page(number, same=99 if number < 10 else 0) for number in range(30)]
    for document in pages[20:]:
        document["paragraphs"] = [[english, f"{chinese[:-1]}\x92。"] for english, chinese in document["paragraphs"]]
    known = set().union(*(make_data.shingles(text) for pair in page(50, same=99)["paragraphs"] for text in pair))
    wanted = {"calc": {"zh": 4, "mixed": 4, "en": 4}}

    def numbers(rows: list[dict[str, Any]], *languages: str) -> set[int]:
        return {int(re.findall(r"\d+", row["page"])[0]) for row in rows if row["language"] in languages}

    unfiltered = make_data.labelled(pages, wanted, set(), random.Random(1))
    assert min(numbers(unfiltered, "en", "zh", "mixed")) < 10
    made = make_data.labelled(pages, wanted, known, random.Random(1))
    assert min(numbers(made, "en", "zh", "mixed")) >= 10
    assert max(numbers(made, "zh", "mixed")) < 20 <= max(numbers(made, "en"))


def test_more_rows_than_there_is_text_for_are_refused(make_data: Any) -> None:
    with pytest.raises(SystemExit, match=r"No text is left after .* of 50 rows: lower the numbers of rows"):
        make_data.labelled([page(1)], {"calc": {"zh": 50}}, set(), random.Random(1))
