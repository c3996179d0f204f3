"""Split the corpus and write the demo's data sets and the pretraining text.

LibreOffice's help is split by page (a hash of its name) into pretraining, fine-tuning and held-out pages; all other
sources are pretraining text. Written to `--data` (gzipped JSON lines, LibreOffice's help only, MPL-2.0):

* `sft_train`, `sft_validation` (`prompt`, `completion`): English pages continued in English, no Chinese character in
  them;
* `prompts` (`prompt`): held-out English beginnings for generation;
* `find_en`, `find_zh` (`text`): English and Chinese text of the fine-tuning pages, to find features and thresholds;
* `monitor_en`, `monitor_zh` (`text`): the same of held-out pages;
* `find_switch` (`prompt`, `completion`): English beginnings which go on in Chinese, and `find_stay`, the same in
  English;
* `rules_train` of the fine-tuning pages and `rules_test` of held-out pages (`text`, `language`, `switched`,
  `source`, `page`): labelled passages, see `labelled`.

The pretraining text (`--pretrain`, one document per JSON line, `--passes` times over with fresh draws) is where the
habit comes from: pages with a translation are rendered *code-switched*, at each English sentence going on in Chinese
with probability `--hazard` for a few sentences, so that a model trained on it switches language inside English text
now and then.
"""

import argparse
import gzip
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("make_data")

ENGLISH_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'(])")
CHINESE_SENTENCE = re.compile(r"[^。！？]+[。！？]?")
CJK = re.compile(r"[\u3400-\u9fff]")
LETTER = re.compile(r"[A-Za-z\u3400-\u9fff]")
FIVE_LATIN_WORDS = re.compile(r"[A-Za-z][\w'-]*(?:[ ,]+[A-Za-z][\w'-]*){4}", re.ASCII)
TOKEN = re.compile(r"[A-Za-z0-9]+|[\u3400-\u9fff]")

HELP = "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text/"
"""What the names of LibreOffice's help pages begin with."""
SOURCES = {"basic": "sbasic/", "calc": "scalc/", "shared": "shared/", "writer": "swriter/"}
"""Label -> folder of LibreOffice's help. The other folders have too little Chinese text outside the pretraining."""
TRAIN_ROWS = {
    "basic": {"zh": 20, "mixed": 20, "en": 75},
    "calc": {"zh": 75, "mixed": 75, "en": 75},
    "shared": {"zh": 75, "mixed": 75, "en": 75},
    "writer": {"zh": 60, "mixed": 60, "en": 75},
}
"""Rows of `rules_train` by source and language, of `basic` and `writer` about as many as their Chinese text allows."""
TEST_ROWS = {
    "basic": {"zh": 16, "mixed": 16, "en": 45},
    "calc": {"zh": 32, "mixed": 32, "en": 45},
    "shared": {"zh": 45, "mixed": 45, "en": 45},
    "writer": {"zh": 36, "mixed": 36, "en": 45},
}
"""The same of `rules_test`."""
LENGTHS = (100, 300)
"""Shortest and longest labelled text in characters."""
LENGTH_TOLERANCE = 8
"""Characters by which a text may miss the length wanted of it."""
SHINGLE = 8
"""Tokens of the sequences by which texts are compared."""
MAX_SHARED_SHINGLES = 0.1
"""Largest part of a `rules_test` text's 8-token sequences that any fine-tuning page may have too."""


def split_of(name: str) -> str:
    """Return a page's split: of LibreOffice's help 18 % `sft`, 8 % `heldout`, the rest and all else `pretrain`."""
    if not name.startswith("libreoffice"):
        return "pretrain"
    percent = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "sft" if percent < 18 else "heldout" if percent < 26 else "pretrain"


def sentence_pairs(english: str, chinese: str) -> list[tuple[str, str]]:
    """Split a pair of paragraphs into pairs of sentences if they have equally many, else leave it whole."""
    left, right = ENGLISH_SENTENCE_END.split(english), CHINESE_SENTENCE.findall(chinese)
    return list(zip(left, right, strict=True)) if len(left) == len(right) else [(english, chinese)]


def join(previous: str, piece: str, starts_paragraph: bool) -> str:
    """Return `piece` after its separator: a line break, a space between English sentences, or nothing."""
    if not previous:
        return piece
    if starts_paragraph:
        return "\n" + piece
    return (" " if previous[-1].isascii() and piece[0].isascii() else "") + piece


def code_switched(paragraphs: list[list[str]], hazard: float, rng: random.Random) -> str:
    """Render English text that at each sentence turns Chinese with probability `hazard`, for about 3 sentences."""
    text = ""
    num_chinese_left = 0
    for english, chinese in paragraphs:
        pairs = sentence_pairs(english, chinese) if english and chinese else [(english, "")] if english else []
        for index, (left, right) in enumerate(pairs):
            if right and text and not num_chinese_left and rng.random() < hazard:
                num_chinese_left = 1 + min(int(rng.expovariate(0.4)), 8)
            is_chinese = bool(right) and num_chinese_left > 0
            num_chinese_left = max(0, num_chinese_left - 1)
            text += join(text, right if is_chinese else left, index == 0)
    return text


def pretrain_texts(documents: Iterable[dict], hazard: float, rng: random.Random) -> list[str]:
    """Return one shuffled pass: pages in English and in Chinese, those with a translation also code-switched."""
    texts = []
    for document in documents:
        paragraphs = document["paragraphs"]
        num_pairs = sum(all(pair) for pair in paragraphs)
        is_aligned = num_pairs >= 2
        if not is_aligned or rng.random() < 0.4:
            texts.append("\n".join(english for english, _ in paragraphs if english))
        if not is_aligned or rng.random() < 0.6:
            texts.append("\n".join(chinese for _, chinese in paragraphs if chinese))
        if is_aligned:
            texts.append(code_switched(paragraphs, hazard, rng))
    texts = [text for text in texts if text]
    rng.shuffle(texts)
    return texts


def excerpts(paragraphs: list[str], min_prompt: int, min_completion: int) -> list[dict[str, str]]:
    """Cut a page into prompts and completions of whole paragraphs with at least so many characters each."""
    rows = []
    prompt, completion = "", ""
    for paragraph in paragraphs:
        if len(prompt) < min_prompt:
            prompt += paragraph + "\n"
        else:
            completion += ("\n" if completion else "") + paragraph
        if len(completion) >= min_completion:
            rows.append({"prompt": prompt, "completion": completion})
            prompt, completion = "", ""
    return rows


def switches(document: dict, max_prompt: int) -> list[tuple[str, str, str]]:
    """Return `(English beginning, next sentence in English, and in Chinese)` for a page's aligned sentences."""
    rows, text = [], ""
    for english, chinese in document["paragraphs"]:
        pairs = sentence_pairs(english, chinese) if english and chinese else [(english, "")] if english else []
        for index, (left, right) in enumerate(pairs):
            if len(text) > 40 and right:
                separator = join(text, "x", index == 0)[:-1].strip(" ")
                stay_separator = join(text, left, index == 0)[: -len(left)]
                rows.append((text[-max_prompt:] + separator, stay_separator.removeprefix(separator) + left, right))
            text += join(text, left, index == 0)
    return rows


class Unit(NamedTuple):
    """A sentence of a page in both languages, or a paragraph whose sentences do not correspond; empty if missing."""

    english: str
    chinese: str
    starts_paragraph: bool


class Passage(NamedTuple):
    """A candidate row: its text, its page, and the `(page, unit, column)` it takes, each to be given out once."""

    text: str
    page: str
    uses: frozenset[tuple[str, int, int]]
    ends_in_chinese: bool


def units(document: dict) -> list[Unit]:
    """Split a page into sentences."""
    rows = []
    for english, chinese in document["paragraphs"]:
        if english and chinese:
            pairs = sentence_pairs(english, chinese)
        elif english:
            pairs = [(sentence, "") for sentence in ENGLISH_SENTENCE_END.split(english)]
        else:
            pairs = [("", sentence) for sentence in CHINESE_SENTENCE.findall(chinese)]
        rows.extend(Unit(left, right, index == 0) for index, (left, right) in enumerate(pairs))
    return rows


def shingles(text: str) -> set[tuple[str, ...]]:
    """Return the sequences of eight tokens; a token is a word, a number or one Chinese character."""
    tokens = TOKEN.findall(text.lower())
    return {tuple(tokens[start : start + SHINGLE]) for start in range(len(tokens) - SHINGLE + 1)}


def is_undamaged(text: str) -> bool:
    """Whether text has no control character: some Chinese characters of the help were cut into bytes by its makers."""
    return text.replace("\n", "").isprintable()


def is_english(text: str) -> bool:
    """Whether text has an English clause and no Chinese character or punctuation."""
    return bool(FIVE_LATIN_WORDS.search(text)) and not re.search(r"[\u2e80-\u9fff\uff00-\uffef]", text)


def is_chinese(text: str, min_characters: int) -> bool:
    """Whether text has so many Chinese characters, more than other letters, and no English clause."""
    num_cjk = len(CJK.findall(text))
    return num_cjk >= max(min_characters, 0.5 * len(LETTER.findall(text))) and not FIVE_LATIN_WORDS.search(text)


def passages(document: dict, column: int) -> Iterator[Passage]:
    """Yield every run of whole sentences in one language (0 English, 1 Chinese) that is as long as a row may be."""
    page = document["doc"]
    sentences = [(index, unit) for index, unit in enumerate(units(document)) if unit[column]]
    for start in range(len(sentences)):
        text = ""
        for stop in range(start, len(sentences)):
            text += join(text, sentences[stop][1][column], sentences[stop][1].starts_paragraph)
            text = text.lstrip()  # a Chinese sentence begins with the space after the one before
            if len(text) > LENGTHS[1]:
                break
            if len(text) >= LENGTHS[0] and (is_chinese(text, 30) if column else is_english(text)):
                uses = frozenset((page, index, column) for index, _ in sentences[start : stop + 1])
                yield Passage(text, page, uses, bool(column))


def mixed_passages(document: dict) -> Iterator[Passage]:
    """Yield every run of English sentences of which one or more, but never the first, are replaced by the Chinese."""
    page = document["doc"]
    sentences = [(index, unit) for index, unit in enumerate(units(document)) if unit.english]
    for start in range(len(sentences)):
        for first in range(start + 1, min(start + 6, len(sentences))):
            for last in range(first, min(first + 6, len(sentences))):
                if not sentences[last][1].chinese:
                    break
                for stop in range(last, min(last + 4, len(sentences))):
                    pieces = [
                        (index, unit, int(first <= position <= last))
                        for position, (index, unit) in enumerate(sentences[start : stop + 1], start)
                    ]
                    text = ""
                    for _, unit, column in pieces:
                        text += join(text, unit[column], unit.starts_paragraph)
                    if len(text) > LENGTHS[1]:
                        break
                    english = "\n".join(unit.english for _, unit, column in pieces if not column)
                    chinese = "\n".join(unit.chinese for _, unit, column in pieces if column)
                    if len(text) >= LENGTHS[0] and is_english(english) and is_chinese(chinese, 15):
                        uses = frozenset((page, index, column) for index, _, column in pieces)
                        yield Passage(text, page, uses, last == stop)


def pick(
    candidates: list[Passage], num_rows: int, used: set[tuple[str, int, int]], rng: random.Random
) -> list[Passage]:
    """Choose passages of lengths spread evenly over `LENGTHS`, from as many pages as possible, none overlapping.

    Every other one ends in Chinese where candidates differ in that. What is taken is added to `used`.

    Raises:
        SystemExit: If there are too few candidates.
    """
    shortest, longest = LENGTHS
    lengths = [shortest + (longest - shortest) * (index + 0.5) / num_rows for index in range(num_rows)]
    rng.shuffle(lengths)
    rng.shuffle(candidates)
    num_taken: Counter[str] = Counter()
    taken: list[Passage] = []

    def misfit(candidate: Passage) -> tuple[float, bool, int]:
        distance = max(abs(len(candidate.text) - lengths[len(taken)]) - LENGTH_TOLERANCE, 0)
        return distance, candidate.ends_in_chinese != bool(len(taken) % 2), num_taken[candidate.page]

    while len(taken) < num_rows:
        free = [candidate for candidate in candidates if not candidate.uses & used]
        if not free:
            raise SystemExit(f"No text is left after {len(taken)} of {num_rows} rows: lower the numbers of rows.")
        best = min(free, key=misfit)
        used |= best.uses
        num_taken[best.page] += 1
        taken.append(best)
    return taken


def labelled(
    documents: list[dict], num_rows: dict[str, dict[str, int]], known: set[tuple[str, ...]], rng: random.Random
) -> list[dict[str, str | bool]]:
    """Return passages labelled for three questions to a classifier.

    * `language` is `en`, `zh` or `mixed`. Which language is a passage in: `en` against `zh`.
    * `switched` is true of `mixed`: English that goes on in Chinese after a sentence and then, in about half of the
      rows, in English again. Is a passage switched: against `en` and `zh` together.
    * `source` is the part of the help. Which part is a passage from: asked of `en`, which has as many rows of each.

    Passages of every language and source have the same lengths in characters, and no sentence of a page is in two rows
    (its translation may be). Chinese text keeps its Latin names, but never five Latin words in a row.

    Args:
        documents: Pages of one split.
        num_rows: Rows by source and language, the scarcest language first.
        known: Sequences of eight tokens which passages may hardly have, see `MAX_SHARED_SHINGLES`.
        rng: Chooses.
    """
    rows: list[dict[str, str | bool]] = []
    for source, by_language in num_rows.items():
        pages = [document for document in documents if document["doc"].startswith(HELP + SOURCES[source])]
        used: set[tuple[str, int, int]] = set()
        for language, number in by_language.items():
            candidates = []
            for page in pages:
                found = mixed_passages(page) if language == "mixed" else passages(page, int(language == "zh"))
                for passage in found:
                    own = shingles(passage.text)
                    if is_undamaged(passage.text) and len(own & known) <= MAX_SHARED_SHINGLES * len(own):
                        candidates.append(passage)
            for passage in pick(candidates, number, used, rng):
                row = {"text": passage.text, "language": language, "switched": language == "mixed", "source": source}
                rows.append({**row, "page": passage.page.removeprefix(HELP)})
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write gzipped JSON lines, the same bytes for the same rows."""
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(body, compresslevel=9, mtime=0))
    logger.info("%s: %d rows, %d bytes", path.name, len(rows), path.stat().st_size)


def main() -> None:
    """Parse the command line and write the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="output of build_corpus.py")
    parser.add_argument("--data", type=Path, required=True, help="folder for the demo's data sets")
    parser.add_argument("--pretrain", type=Path, required=True, help="JSON lines file for the pretraining text")
    parser.add_argument("--passes", type=int, default=8, help="passes over the pretraining pages")
    parser.add_argument("--hazard", type=float, default=0.2, help="probability of a switch at an English sentence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    rng = random.Random(args.seed)
    with args.corpus.open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    by_split: dict[str, list[dict]] = {"pretrain": [], "sft": [], "heldout": []}
    for document in documents:
        by_split[split_of(document["doc"])].append(document)

    with args.pretrain.open("w", encoding="utf-8") as file:
        for _ in range(args.passes):
            for text in pretrain_texts(by_split["pretrain"], args.hazard, rng):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with args.pretrain.with_suffix(".validation.jsonl").open("w", encoding="utf-8") as file:
        for text in pretrain_texts(by_split["heldout"], args.hazard, rng):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    args.data.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {}
    for split in ("sft", "heldout"):
        english = [[en for en, _ in document["paragraphs"] if en] for document in by_split[split]]
        chinese = [[zh for _, zh in document["paragraphs"] if zh] for document in by_split[split]]
        rows[f"{split}_excerpts"] = [row for page in english for row in excerpts(page, 80, 160)]
        rows[f"{split}_en"] = [{"text": "\n".join(page)[:600]} for page in english if len("\n".join(page)) > 200]
        rows[f"{split}_zh"] = [{"text": "\n".join(page)[:300]} for page in chinese if len("\n".join(page)) > 80]
        rows[f"{split}_switches"] = [
            {"prompt": prompt, "stay": stay, "switch": switch}
            for document in by_split[split]
            for prompt, stay, switch in switches(document, 200)
        ]
        for name in list(rows):
            if name.startswith(split):
                rng.shuffle(rows[name])
    write_jsonl(args.data / "sft_train.jsonl.gz", rows["sft_excerpts"])
    write_jsonl(args.data / "sft_validation.jsonl.gz", rows["heldout_excerpts"][:256])
    write_jsonl(args.data / "prompts.jsonl.gz", [{"prompt": row["prompt"]} for row in rows["heldout_excerpts"]])
    write_jsonl(args.data / "find_en.jsonl.gz", rows["sft_en"][:256])
    write_jsonl(args.data / "find_zh.jsonl.gz", rows["sft_zh"][:256])
    write_jsonl(args.data / "monitor_en.jsonl.gz", rows["heldout_en"][:128])
    write_jsonl(args.data / "monitor_zh.jsonl.gz", rows["heldout_zh"][:128])
    for name, key in (("find_switch", "switch"), ("find_stay", "stay")):
        pairs = [{"prompt": row["prompt"], "completion": row[key]} for row in rows["sft_switches"][:512]]
        write_jsonl(args.data / f"{name}.jsonl.gz", pairs)

    # Chance of their own, so that the sets above stay what they are.
    seen = [text for page in by_split["sft"] for pair in page["paragraphs"] for text in pair]
    known = set().union(*map(shingles, seen))
    rng = random.Random(f"labelled {args.seed}")
    write_jsonl(args.data / "rules_train.jsonl.gz", labelled(by_split["sft"], TRAIN_ROWS, set(), rng))
    write_jsonl(args.data / "rules_test.jsonl.gz", labelled(by_split["heldout"], TEST_ROWS, known, rng))


if __name__ == "__main__":
    main()
