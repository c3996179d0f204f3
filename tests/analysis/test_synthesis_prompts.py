"""Templates, what is taken from an answer, beginnings, and the settings' errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qscope_trl.activations.sources import open_source
from qscope_trl.analysis.synthesis.coverage import Example
from qscope_trl.analysis.synthesis.prompts import (
    Template,
    beginning,
    describe,
    load_template,
    normalised,
    opening_of,
    parse_prompts,
    read_prompts,
    shown_examples,
    visible,
)
from qscope_trl.bundled import MODEL
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.errors import ConfigError, DataError
from qscope_trl.features import FeatureId
from tests.analysis.synthesis_world import write_rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_messages_hold_what_is_put_in_and_no_system_message_unless_given() -> None:
    template = Template(prompts="{count} about {description}{examples}, {{so}}")
    assert template.messages("prompts", description="a {b}", examples="", count=3) == (
        {"role": "user", "content": "3 about a {b}, {so}"},
    )
    spoken = Template(system="Be brief.").messages("response", prompt="Hi", description="", examples="")
    assert spoken == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert template.digest != Template().digest
    assert Template().digest == Template().digest


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("prompts", "{descripton}", r"unknown placeholder `\{descripton\}`; it may hold `\{description\}`"),
        ("system", "{count}", r"unknown placeholder `\{count\}`; it may hold none"),
        ("prompts", "write {count}", r"`prompts` lacks `\{description\}` and `\{examples\}`, .* whatever the feature"),
        ("response", "hello", r"`response` lacks `\{prompt\}`, .* whatever the prompt"),
        ("prompts", "{description} }", "`prompts` has a brace that stands alone"),
        ("rewrite", "{prompt!r}", r"holds `\{prompt\}` with a format; write the name alone"),
    ],
)
def test_templates_that_would_not_work_are_refused(part: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Template(**{part: text})


def test_a_template_file_changes_the_parts_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prompts: 'Ask {count} times for {description}.'\nsystem: Be brief.\n")
    template = load_template(str(path))
    assert (template.name, template.system, template.plain) == ("mine.yaml", "Be brief.", Template().plain)
    plain = tmp_path / "mine.txt"
    plain.write_text("Ask for {description}.")
    assert load_template(str(plain)).prompts == "Ask for {description}."
    assert load_template(None) == Template()
    with pytest.raises(ConfigError, match=r"No template at '.*absent\.txt'"):
        load_template(str(tmp_path / "absent.txt"))
    path.write_text("prompt: x")
    with pytest.raises(ConfigError, match=r"Unknown key `prompt` in .*a template has name, system, prompts"):
        load_template(str(path))
    path.write_text("system: 3")
    with pytest.raises(ConfigError, match=r"`system` in '.*' is 3; it is a text"):
        load_template(str(path))
    path.write_text("response: hello")
    with pytest.raises(ConfigError, match=r"mine\.yaml': The template's `response` lacks"):
        load_template(str(path))
    plain.write_bytes(b"\xff\xfe{description}")
    with pytest.raises(ConfigError, match="is not a text in UTF-8"):
        load_template(str(plain))


@pytest.mark.parametrize(
    ("answer", "prompts"),
    [
        ("How?\nWhy?\n\nHow?\nWhen?", ["How?", "Why?", "When?"]),
        ('1. "How?"\n2) Why?\n(3) When?', ["How?", "Why?", "When?"]),
        ("- How?\n* Why?\n\u2022 \u201cWhen?\u201d", ["How?", "Why?", "When?"]),
        ('["How?", "Why?\\nWhen?"]', ["How?", "Why?\nWhen?"]),
        ('```json\n["How?"]\n```', ["How?"]),
        ("[not json\nWhy?", ["[not json", "Why?"]),
        ("3D printing?\n2024 was what?", ["3D printing?", "2024 was what?"]),
        (" \n", []),
        ("\n".join("abcdefgh"), list("abcde")),
    ],
)
def test_prompts_are_found_in_lists_of_any_kind(answer: str, prompts: list[str]) -> None:
    assert parse_prompts(answer, 5) == prompts


def test_what_an_answer_shows() -> None:
    assert visible("<think>so\nso</think>Yes") == "Yes"
    assert visible(" <think>and the tokens end") == ""
    assert visible("I <think> so") == "I <think> so"
    assert visible("half a \u4e2d\ufffd\ufffd") == "half a \u4e2d"
    assert visible("lone \ud800!").encode("utf-8")
    assert normalised("  \uff21b\n\tC ") == "ab c"


def test_a_beginning_ends_just_before_the_peak(tokenizer: Any) -> None:
    text = "Choose the menu \u201c\u6587\u4ef6\u201d and then Open, to read the file."
    ids = tokenizer(text)["input_ids"]
    for place in range(1, len(ids)):
        whole, peak = beginning(tokenizer, Example(text, 1.0, place), 999)
        assert whole == text[:peak]
        # Several tokens may share a character; none from the peak on is in the text before it.
        assert len(tokenizer(whole)["input_ids"]) <= place
        last, same = beginning(tokenizer, Example(text, 1.0, place), 3)
        assert same == peak
        assert whole.endswith(last)
        assert len(last) <= len(whole)


def test_an_opening_is_at_most_half_of_a_short_text(tokenizer: Any) -> None:
    text = "The text flows from one frame to the next frame, whatever its size."
    num = len(tokenizer(text)["input_ids"])
    assert text.startswith(opening_of(tokenizer, text, 4))
    assert len(tokenizer(opening_of(tokenizer, text, 4))["input_ids"]) == 4
    assert len(tokenizer(opening_of(tokenizer, text, 999))["input_ids"]) == (num + 1) // 2
    assert opening_of(tokenizer, "", 4) == ""


def test_examples_are_cut_around_the_peak() -> None:
    long = "a " * 500 + "PEAK " + "b " * 500
    shown = shown_examples([Example(long, 1.0, 0), Example("short\ntext", 1.0, 0)], [1000, 0])
    first, second = shown.splitlines()[1:]
    assert "PEAK" in first
    assert first.startswith("- ...")
    assert first.endswith("...")
    assert len(first) < 420
    assert second == "- short text"
    assert shown_examples([], []) == ""


def test_prompts_are_read_for_all_and_for_their_own_features(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "feature": "L1F2"}, {"prompt": " "}, {"prompt": "c", "feature": None}]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    assert read_prompts(open_source(str(path)), "prompt") == (["a", "c"], {FeatureId(1, 2): ["b"]})
    blank = write_rows(tmp_path / "blank.jsonl", [{"prompt": ""}])
    with pytest.raises(DataError, match=r"'.*blank\.jsonl' holds no prompt"):
        read_prompts(open_source(str(blank)), "prompt")


def test_a_feature_needs_a_label_or_examples() -> None:
    one, two = FeatureId(1, 2), FeatureId(1, 3)
    examples = {two: [Example("text", 1.0, 0)]}
    assert describe({one: " dates ", two: ""}, examples) == {
        one: "dates",
        two: "what the passages below have in common",
    }
    with pytest.raises(ConfigError, match="1 of 2 features have neither a label nor examples, the first is L1F2"):
        describe({one: "", two: ""}, examples)


GIVEN: dict[str, Any] = {"model": "m", "saes": "s", "features": "f", "output": "o", "data": "d"}
ENDPOINT = {"generator": "endpoint", "base_url": "http://localhost:8000/v1", "generator_model": "g"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "all"}, "`fill` is 'all'"),
        ({"generator": "remote"}, "`generator` is 'remote'"),
        ({"encode_as": "json"}, "`encode_as` is 'json'"),
        ({"mode": "chat"}, "`mode` is 'chat'"),
        ({"accept": 0}, "`accept` is 0"),
        ({"min_activation": -1.0}, r"`min_activation` is -1\.0"),
        ({"requests_per_minute": 0.0}, r"`requests_per_minute` is 0\.0; it is above 0"),
        ({"timeout": 0.0}, r"`timeout` is 0\.0; it is above 0"),
        ({"top_p": 0.0}, r"`top_p` is 0\.0; it is above 0, and 1 at most"),
        ({"store": "x"}, "Give what is to be covered in one way"),
        ({"data": None}, "Give what is to be covered in one way"),
        ({"data": None, "store": "x", "max_rows": 3}, "`--max-rows` is for `--data`"),
        ({"generator": "endpoint"}, "`--generator endpoint` needs `--base-url`"),
        ({**ENDPOINT, "base_url": "localhost:8000"}, "begins with http:// or https:// and a host"),
        ({**ENDPOINT, "base_url": "http://[::1/v1"}, "begins with http:// or https:// and a host"),
        ({**ENDPOINT, "base_url": "http://host:80a/v1"}, "begins with http:// or https:// and a host"),
        ({**ENDPOINT, "base_url": "http://me:key@host/v1"}, "would be written to the journal"),
        ({**ENDPOINT, "base_url": "http://host/v1?key=a"}, "would be written to the journal"),
        ({"api_key_env": "KEY"}, "`--api-key-env` and `--extra-body` are for `--generator endpoint`"),
        ({"template": "t"}, "`--template` and `--rewrite` are for `--mode instruct`"),
        ({"encode_as": "chat"}, "`--encode-as chat` is for `--mode instruct`"),
        ({**ENDPOINT, "extra_body": "{"}, "which is not JSON"),
        ({**ENDPOINT, "extra_body": "[1]"}, "it is a JSON object from field to value"),
        ({**ENDPOINT, "extra_body": '{"n": 2}'}, "`extra_body` sets `n`, which is set by other settings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SynthesizeConfig(**{**GIVEN, **changes})


def test_the_generators_have_their_own_modes() -> None:
    assert SynthesizeConfig(**GIVEN).writing_mode == "continue"
    endpoint = SynthesizeConfig(**GIVEN, **ENDPOINT, extra_body='{"top_k": 20, "seed": null}')
    assert endpoint.writing_mode == "instruct"
    assert endpoint.body() == {"top_k": 20, "seed": None}
