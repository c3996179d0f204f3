"""Split the corpus and write the demo's data sets and the pretraining text.

LibreOffice's help is split by page (a hash of its name) into pretraining, fine-tuning and held-out pages; all other
sources are pretraining text. Written to `--data` (gzipped JSON lines, LibreOffice's help only, MPL-2.0):

* `sft_train`, `sft_validation` (`prompt`, `completion`): English pages continued in English, no Chinese character in
  them;
* `prompts` (`prompt`): held-out English beginnings for generation;
* `find_en`, `find_zh` (`text`): English and Chinese text of the fine-tuning pages, to find features and thresholds;
* `monitor_en`, `monitor_zh` (`text`): the same of held-out pages;
* `find_switch` (`prompt`, `completion`): English beginnings which go on in Chinese, and `find_stay`, the same in
  English.

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
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger("make_data")

ENGLISH_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"'(])")
CHINESE_SENTENCE = re.compile(r"[^。！？]+[。！？]?")


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


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
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


if __name__ == "__main__":
    main()
