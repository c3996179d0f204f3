"""The same tokens twice: with and without BOS, in a chat template, in a tuned model, and through a FeatureSet."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qscope_trl import SAESuite
from qscope_trl.analysis.doctor import chosen
from qscope_trl.analysis.doctor.context import Pairing, compare, has_bos, in_template, with_bos
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.fit import Run, survey
from qscope_trl.analysis.doctor.result import FeatureFiring, TunedFit
from qscope_trl.analysis.doctor.tuned import check_same_shape, compare_tuned, divergence, open_tuned
from qscope_trl.errors import ConfigError, ModelStructureError
from qscope_trl.features import Feature, FeatureSet
from tests.analysis.dense import decoded, dense, unexplained
from tests.tiny import D_SAE, NUM_LAYERS, K, prompt_completion_rows, tiny_model, tiny_tokenizer, write_saes

TEXTS = [row["prompt"] + row["completion"] for row in prompt_completion_rows(20, longest=16)]
IDS = tiny_tokenizer()(TEXTS)["input_ids"]
RUN = Run(token_ids=IDS, probe_tokens=10**6, show_progress=False)
LAYERS = (0, 2)
CHAT = "{% for m in messages %}w90 w91 {{ m['content'] | trim }} w92{% endfor %}"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SAESuite:
    return SAESuite.from_pretrained(write_saes(tmp_path_factory.mktemp("saes") / "x"), k=K)


@pytest.fixture(scope="module")
def saes(suite: SAESuite) -> dict[int, Any]:
    return {layer: suite.load(layer) for layer in LAYERS}


@torch.no_grad()
def outputs(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """Output of a layer for one text alone."""
    return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    both, either = ((first > 0) & (second > 0)).sum(1), ((first > 0) | (second > 0)).sum(1)
    return float((both / either).mean())


# BOS and chat template


def test_bos_is_told_from_the_token_ids() -> None:
    tokenizer = tiny_tokenizer()
    assert has_bos(tokenizer, IDS) is None
    tokenizer.bos_token = "w95"
    assert has_bos(tokenizer, IDS) is False
    assert has_bos(tokenizer, [[95, 2], [95]]) is True


def test_bos_is_put_before_the_same_tokens() -> None:
    added = with_bos([[5, 6, 7], [8]], 95, is_there=False, max_length=10)
    assert added == Pairing([[5, 6, 7], [8]], [[1, 2], []], [[95, 5, 6, 7], [95, 8]], [[2, 3], []])
    assert with_bos([[95, 5, 6, 7], [95, 8]], 95, is_there=True, max_length=10) == added
    short = with_bos([[5, 6, 7]], 95, is_there=False, max_length=3)
    assert (short.plain, short.other) == ([[5, 6]], [[95, 5, 6]])


def test_a_chat_template_is_put_around_the_same_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    found = in_template(tokenizer, [" w5 w6 w5 w7", "w8"], max_length=10)
    assert found is not None
    assert (found.plain[0], found.plain_keep[0]) == ([5, 6, 5, 7], [1, 2, 3])
    assert (found.other[0], found.other_keep[0]) == ([90, 91, 5, 6, 5, 7, 92], [3, 4, 5])
    assert (found.plain_keep[1], found.other_keep[1]) == ([], [])
    cut = in_template(tokenizer, ["w5 w6 w5 w7"], max_length=4)
    assert cut is not None
    assert (cut.plain_keep[0], cut.other_keep[0]) == ([1], [3])


def test_a_template_that_drops_the_text_shares_nothing(model: Any, saes: dict[int, Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w90"
    found = in_template(tokenizer, TEXTS, max_length=10)
    assert found == Pairing([], [], [], [])
    assert compare(model, saes, found, RUN, survey(model, RUN, LAYERS), "chat") == []


def test_a_tokenizer_without_offsets_cannot_tell() -> None:
    class Slow:
        is_fast = False

    assert in_template(Slow(), TEXTS, max_length=10) is None


def test_contexts_are_compared_token_by_token(model: Any, saes: dict[int, Any]) -> None:
    pairing = with_bos(IDS, 95, is_there=False, max_length=512)
    found = compare(model, saes, pairing, RUN, survey(model, RUN, LAYERS), "BOS")
    assert [one.layer for one in found] == list(LAYERS)
    for one in found:
        plain = torch.cat([outputs(model, row, one.layer)[1:] for row in IDS])
        other = torch.cat([outputs(model, [95, *row], one.layer)[2:] for row in IDS])
        acts, other_acts = (dense(saes[one.layer], x) for x in (plain, other))
        assert one.num_tokens == len(plain)
        for value, x, a in ((one.fvu_plain, plain, acts), (one.fvu, other, other_acts)):
            assert value == pytest.approx(unexplained(x.double().numpy(), decoded(saes[one.layer], a)), rel=1e-4)
        assert one.l0_plain == pytest.approx((acts > 0).sum(1).mean(), rel=1e-3)
        assert one.l0 == pytest.approx((other_acts > 0).sum(1).mean(), rel=1e-3)
        assert one.jaccard == pytest.approx(overlap(acts, other_acts), rel=1e-3)
    assert found[1].jaccard < 0.99


def broken_at(model: Any, token: int) -> Any:
    """A copy whose embedding of a token is NaN; so is what attends to it, and with some kernels all of the text."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = math.nan
    return broken


def test_residuals_that_are_not_finite_in_a_context_are_told(model: Any, suite: SAESuite) -> None:
    unused = next(token for token in range(8, 96) if all(token not in row for row in IDS))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT.replace("w90", f"w{unused}")
    result = diagnose(broken_at(model, unused), tokenizer, suite, TEXTS, layers=[2], scan=0, show_progress=False)
    [told] = [finding for finding in result.findings if finding.check in ("dtype", "chat template")]
    tokens = sum(len(row) - 1 for row in IDS)
    assert told.severity == "fail"
    assert told.what.startswith(f"In float32 the residuals of {tokens} tokens in the chat template are NaN or inf")
    assert result.chat[0].not_finite == tokens


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Words by white space; `w95` is BOS and added by itself."""
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(96)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="w95 $A", special_tokens=[("w95", 95)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w95", pad_token="w0", model_input_names=["input_ids", "attention_mask"]
    )


def test_a_diagnosis_holds_both_contexts(model: Any, suite: SAESuite) -> None:
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = CHAT
    result = diagnose(model, tokenizer, suite, TEXTS, layers=[2], scan=0, show_progress=False)
    assert len(result.bos) == len(result.chat) == 1
    assert result.bos[0].num_tokens == sum(len(row) - 1 for row in IDS)
    # The first word of a text follows BOS, so it is compared in the template too.
    assert result.chat[0].num_tokens == sum(map(len, IDS))
    checks = {finding.check: finding for finding in result.findings}
    assert "adds" in checks["BOS"].what
    assert "in the template" in checks["chat template"].what
    given = diagnose(model, tokenizer, suite, TEXTS, layers=[2], is_chat=True, scan=0, show_progress=False)
    assert given.chat == ()
    assert {f.check: f for f in given.findings}["chat template"].what.startswith("The texts are conversations")


# Base against tuned


def compared(base: Any, tuned: Any, saes: dict[int, Any]) -> list[TunedFit]:
    return compare_tuned(base, tuned, saes, RUN, survey(base, RUN, LAYERS))


def test_an_identical_model_is_the_same_to_the_bit(model: Any, suite: SAESuite, saes: dict[int, Any]) -> None:
    for one in compared(model, copy.deepcopy(model), saes):
        assert one.jaccard == 1.0
        assert one.residual_cosine == pytest.approx(1.0, abs=1e-6)
        assert (one.fvu, one.cosine) == (one.fvu_base, one.cosine_base)
        assert one.changed_share in (0.0, pytest.approx(math.nan, nan_ok=True))
    assert divergence(model, copy.deepcopy(model), RUN) == 0.0
    result = diagnose(model, tiny_tokenizer(), suite, TEXTS, tuned=copy.deepcopy(model), show_progress=False)
    assert result.kl == 0.0
    assert all(one.jaccard == 1.0 for one in result.tuned)


def test_a_known_change_of_the_model_is_measured_as_it_is(model: Any, saes: dict[int, Any]) -> None:
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.add_(
            0.3 * torch.randn_like(tuned.model.layers[1].mlp.down_proj.weight)
        )
    before, after = compared(model, tuned, saes)
    assert before.jaccard == 1.0  # the change is above layer 0
    assert before.fvu == before.fvu_base
    pair = [torch.cat([outputs(one, row, 2)[1:] for row in IDS]) for one in (model, tuned)]
    acts = [dense(saes[2], x) for x in pair]
    wide = [x.double().numpy() for x in pair]
    for value, x, a in zip((after.fvu_base, after.fvu), wide, acts, strict=True):
        assert value == pytest.approx(unexplained(x, decoded(saes[2], a)), rel=1e-4)
    cosine = [
        ((x * (hat := decoded(saes[2], a))).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(hat, axis=1)).mean()
        for x, a in zip(wide, acts, strict=True)
    ]
    assert (after.cosine_base, after.cosine) == pytest.approx(cosine, rel=1e-4)
    assert after.l0 == pytest.approx((acts[1] > 0).sum(1).mean(), rel=1e-3)
    assert after.jaccard == pytest.approx(overlap(*acts), rel=1e-3)
    assert 0.1 < after.jaccard < 0.9
    alike = (wide[0] * wide[1]).sum(1) / np.linalg.norm(wide[0], axis=1) / np.linalg.norm(wide[1], axis=1)
    assert after.residual_cosine == pytest.approx(alike.mean(), rel=1e-5)
    rates = [(a > 0).sum(0) for a in acts]
    counted = np.maximum(*rates) >= 20
    changed = (np.maximum(*rates)[counted] > 2 * np.minimum(*rates)[counted]).mean()
    assert after.changed_share == pytest.approx(changed, abs=2 / counted.sum())
    assert after.changed_share > 0


def test_a_tuned_model_that_computes_nan_does_not_fit(model: Any, suite: SAESuite) -> None:
    token = IDS[0][3]
    result = diagnose(
        model, tiny_tokenizer(), suite, TEXTS, layers=[2], tuned=broken_at(model, token), scan=0, show_progress=False
    )
    [told] = [finding for finding in result.findings if finding.check == "dtype"]
    assert (told.severity, told.layers) == ("fail", (2,))
    assert told.what.endswith(" tokens of the tuned model are NaN or inf at layer 2.")
    count = re.match(r"In float32 the residuals of (\d+) ", told.what)
    assert count is not None
    texts = [row for row in IDS if token in row]
    assert len(texts) < len(IDS)
    assert sum(len(row) - row.index(token) for row in texts) <= int(count[1]) <= sum(map(len, texts))
    assert (result.verdict, result.kl, result.tuned) == ("does not fit", None, ())
    assert len(result.layers) == 1  # the base model is judged all the same


def test_nan_in_the_head_of_a_tuned_model_is_told_and_no_divergence(model: Any, suite: SAESuite) -> None:
    tuned = copy.deepcopy(model)
    tuned.lm_head = torch.nn.Linear(32, 96, bias=False)
    torch.nn.init.constant_(tuned.lm_head.weight, math.nan)
    result = diagnose(model, tiny_tokenizer(), suite, TEXTS, layers=[2], tuned=tuned, scan=0, show_progress=False)
    assert result.kl is None
    assert [finding.severity for finding in result.findings if finding.check == "dtype"] == ["fail"]
    assert not any("nan" in finding.what for finding in result.findings)
    assert result.tuned[0].jaccard == 1.0


def test_a_token_that_the_head_rules_out_adds_nothing_to_the_divergence(model: Any) -> None:
    masked = copy.deepcopy(model)
    masked.lm_head = torch.nn.Linear(32, 96)
    with torch.no_grad():
        masked.lm_head.bias[7] = -math.inf
    assert divergence(masked, copy.deepcopy(masked), RUN) == 0.0


def test_a_tuned_model_of_outliers_alone_is_compared_at_no_token(model: Any, saes: dict[int, Any]) -> None:
    far = copy.deepcopy(model)
    with torch.no_grad():
        far.model.embed_tokens.weight.mul_(1e4)
    for one in compared(model, far, saes):
        assert one.num_tokens == 0
        assert math.isnan(one.fvu)


def test_divergence_is_the_mean_over_all_positions_of_the_sample(model: Any) -> None:
    tuned = tiny_model(seed=5).eval()
    total, count = 0.0, 0
    for row in IDS:
        with torch.no_grad():
            logits = [one(input_ids=torch.tensor([row])).logits[0].double().numpy() for one in (model, tuned)]
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in logits)
        total += float((p * np.log(p / q)).sum())
        count += len(row)
    assert divergence(model, tuned, RUN) == pytest.approx(total / count, rel=1e-4)
    assert divergence(model, tiny_model(vocab_size=128), RUN) is None


def test_a_model_of_another_shape_is_no_tuned_version(model: Any) -> None:
    for changes, told in (
        ({"hidden_size": 48}, "has 48 for `hidden_size`, the base model 32"),
        ({"num_hidden_layers": 2}, "has 2 for layers, the base model 4"),
    ):
        with pytest.raises(ModelStructureError, match=told):
            check_same_shape(model, tiny_model(**changes), IDS)
    with pytest.raises(ModelStructureError, match=r"have the token \d+ by the base model's .* knows 50"):
        check_same_shape(model, tiny_model(vocab_size=50), IDS)
    check_same_shape(model, tiny_model(seed=3), IDS)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_an_adapter_is_put_on_the_model(saved: Path, saes: dict[int, Any], model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    opened = open_tuned(str(saved), str(tmp_path / "adapter"), revision=None, dtype="auto", device="cpu")
    _, layer_2 = compared(model, opened.eval(), saes)
    assert layer_2.jaccard < 0.9
    assert layer_2.jaccard == pytest.approx(compared(model, adapted.eval(), saes)[1].jaccard)
    plain = open_tuned(str(saved), None, revision=None, dtype="auto", device="cpu")
    assert compared(model, plain.eval(), saes)[1].jaccard == 1.0


def test_what_cannot_be_an_adapter_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The adapter '.*' cannot be put on"):
        open_tuned(str(saved), str(tmp_path), revision=None, dtype="auto", device="cpu")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"`--adapter` needs PEFT: pip install 'qscope-trl\[peft\]'"):
        open_tuned(str(saved), str(tmp_path), revision=None, dtype="auto", device="cpu")


# A FeatureSet


def feature_set(suite: SAESuite, *features: Feature) -> FeatureSet:
    layers = {feature.layer for feature in features}
    prints = {layer: suite.fingerprint(layer) for layer in layers if layer in suite.layers}
    return FeatureSet(features=features, sae_fingerprints=prints, d_model=32, num_layers=NUM_LAYERS)


def test_a_set_of_these_saes_belongs(suite: SAESuite) -> None:
    mine = feature_set(suite, Feature(layer=0, index=1), Feature(layer=2, index=1))
    [told] = chosen.check_set(mine, suite, [0, 1, 2], NUM_LAYERS)
    assert told.severity == "ok"
    assert "fingerprints of layers 0, 2 agree" in told.what


def test_a_set_that_does_not_belong_is_a_misfit(suite: SAESuite) -> None:
    mine = feature_set(suite, Feature(layer=2, index=1))
    for changed, told in (
        (
            FeatureSet(features=mine.features, sae_fingerprints={2: "0" * 16}),
            "is not the one this FeatureSet was",
        ),
        (FeatureSet(features=mine.features, d_model=64), "made for `d_model=64`"),
        (FeatureSet(features=(Feature(layer=2, index=D_SAE),)), "out of range"),
    ):
        [finding] = chosen.check_set(changed, suite, [2], NUM_LAYERS)
        assert finding.severity == "fail"
        assert told in finding.what


def test_layers_of_a_set_that_are_not_checked_are_named(suite: SAESuite) -> None:
    mine = feature_set(suite, Feature(layer=0, index=1), Feature(layer=3, index=1))
    first, second = chosen.check_set(mine, suite, [0], NUM_LAYERS)
    assert (first.severity, first.layers, second.severity) == ("warn", (3,), "ok")
    assert "features in layer 3, which were not checked" in first.what


def firing(rate: float, recorded: dict[str, float] | None = None, tokens: int = 1000) -> FeatureFiring:
    return FeatureFiring(
        name=f"L0F{round(1e4 * rate)}",
        label="",
        num_tokens=tokens,
        token_rate=rate,
        text_rate=0.5,
        recorded=recorded or {},
    )


@pytest.mark.parametrize(
    ("rates", "severity", "told"),
    [
        ([firing(0.1), firing(0.2)], "ok", "All 2 chosen features fire on the texts."),
        ([firing(0.1, {"token_rate": 0.15})], "ok", "at rates like those recorded"),
        ([firing(0.0), firing(0.2)], "note", "1 of 2 chosen features fire at none of the 1000 tokens: L0F0."),
        ([firing(0.0, {"token_rate": 0.004})], "note", "1 of 1 chosen features"),  # 4 expected: silence means nothing
        ([firing(0.0, {"token_rate": 0.01})], "warn", "By their evidence L0F0 should have fired 5 times or more"),
        ([firing(0.3, {"token_rate": 0.1, "token_rate_others": 0.01})], "note", "fires at 30.00% of tokens, recorded"),
        ([firing(0.02, {"token_rate": 0.1, "token_rate_others": 0.01})], "ok", "All 1 chosen"),
    ],
)  # fmt: skip
def test_firing_rates_are_judged_by_the_sets_evidence(rates: list[FeatureFiring], severity: str, told: str) -> None:
    [finding] = chosen.judge_firing(rates)
    assert finding.severity == severity
    assert told in finding.what
    assert chosen.judge_firing([]) == []
