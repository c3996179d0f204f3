"""`qscope synthesize`: measure coverage, generate for what is not covered, keep what fires, measure again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qscope_trl.activations.opening import Opened, load_encoders, open_all, open_model
from qscope_trl.analysis.synthesis.endpoint import EndpointGenerator, is_secret, read_key
from qscope_trl.analysis.synthesis.generators import (
    Generator,
    LocalGenerator,
    Request,
    require_chat_template,
    seed_of,
)
from qscope_trl.analysis.synthesis.journal import Answer, Journal
from qscope_trl.analysis.synthesis.limits import Budget
from qscope_trl.analysis.synthesis.plan import PLAIN, Candidate, Recipe, Scheduler, Target
from qscope_trl.analysis.synthesis.prompts import load_template, normalised
from qscope_trl.analysis.synthesis.report import Filled, Synthesis, format_result, write
from qscope_trl.analysis.synthesis.setup import (
    Sources,
    Start,
    check_output,
    check_store,
    chosen_features,
    journal_settings,
    make_targets,
    measure,
)
from qscope_trl.analysis.synthesis.verify import Verifier, whole_text
from qscope_trl.config.synthesize import SynthesizeConfig
from qscope_trl.errors import ConfigError, EndpointError
from qscope_trl.features import FeatureId, FeatureSet
from qscope_trl.hooks.layers import d_model, find_layers
from qscope_trl.sae.topk_sae import TopKSAE

__all__ = ["format_result", "run"]

JOURNAL = "journal.jsonl"
"""Name of the journal in the output folder."""

# So many answers without text in a row are no accident.
_MOST_EMPTY = 20


def run(config: SynthesizeConfig, *, show_progress: bool = True) -> Synthesis:
    """Measure what the data covers, generate texts for what it does not, and write those that fire.

    Every request and answer is in the journal before anything follows from it. A run that was killed, interrupted or
    that ended with its budget goes on with `resume=True`; nothing that was answered is asked again.

    Args:
        config: The settings.
        show_progress: Whether to show progress bars on stderr.

    Returns:
        What was measured and written.

    Raises:
        ConfigError: If settings do not fit each other, the model, or the journal.
        DataError: If a dataset is not usable, or the journal is damaged.
        EndpointError: If the endpoint cannot be reached, refuses, or keeps failing.
        FeatureSetError: If the features were made for other SAEs.

    References:
        Qwen-Scope, arXiv:2605.11887, section 6.
    """
    features = chosen_features(config)
    template = load_template(config.template)
    key = read_key(config.api_key_env)
    folder = check_output(config.output, resume=config.resume, journal=JOURNAL)
    sources = Sources.open(config)
    if sources.store is not None:
        check_store(config, sources.store, features)
    settings = journal_settings(config, features, template, sources)
    if is_secret(key) and key in repr(settings):
        raise ConfigError(
            f"The key in `{config.api_key_env}` is also in another setting, from where it would be written to the "
            f"journal. Take it out there."
        )
    journal = Journal(folder / JOURNAL, settings) if (folder / JOURNAL).is_file() else None
    try:
        needs_model = config.generator != "none" or sources.store is None
        opened, saes = _open(config, features) if needs_model else (None, {})
        if sources.store is not None and opened is not None:
            check_store(config, sources.store, features, opened)
        start = None if journal is None else journal.facts.get("start")
        measured = (
            measure(config, features, sources, opened, saes, show_progress=show_progress)
            if start is None
            else Start(**start)
        )
        before = measured.coverage(config)
        if config.generator == "none" or opened is None or not measured.to_fill(config):
            result = Synthesis(output=folder, min_activation=config.min_activation, before=before, after=before)
            write(result)
            return result
        writer = _open_writer(config, opened) if config.generator == "local" else (None, opened.tokenizer)
        if config.encode_as == "chat":
            require_chat_template(opened.tokenizer, config.model)
        recipe = Recipe(config, template, lambda text: len(writer[1](text, verbose=False)["input_ids"]))
        targets, prompts_from = make_targets(config, features, measured, recipe, opened.tokenizer, sources.prompts)
        if journal is None:
            journal = Journal(folder / JOURNAL, settings)
        if start is None:
            journal.fact("start", vars(measured))
        budget = Budget(
            config.max_requests,
            config.max_tokens,
            num_requests=journal.num_requests,
            num_tokens=journal.num_tokens,
        )
        generator = _make_generator(config, writer, journal, budget, key)
        verifier = Verifier(config, features.ids, measured.matched, opened, saes)
        try:
            is_finished = _work(
                config, Scheduler(targets), generator, verifier, journal, budget, show_progress=show_progress
            )
        finally:
            generator.close()
        result = _result(
            config, features, measured, targets, prompts_from, journal, folder, generator.name, is_finished
        )
        write(result)
        return result
    finally:
        if journal is not None:
            journal.close()


def _open(config: SynthesizeConfig, features: FeatureSet) -> tuple[Opened, dict[int, TopKSAE]]:
    """Model, tokenizer and encoders of the features' layers, checked to be those that the features were made for."""
    opened = open_all(replace(config, layers=",".join(map(str, features.layers))))
    saes = load_encoders(opened.model, opened.saes, features.layers)
    for layer in features.layers:
        features.with_features(features.for_layer(layer)).check_fits(
            d_model=d_model(opened.model),
            num_layers=len(find_layers(opened.model)),
            d_sae=saes[layer].d_sae,
            sae=config.saes,
            fingerprints={layer: opened.saes.fingerprint(layer)},
        )
    return opened, saes


def _open_writer(config: SynthesizeConfig, opened: Opened) -> tuple[Any, Any]:
    """The local model that writes, and its tokenizer: the model at hand if it is the same."""
    name = config.generator_model or config.model
    revision = config.generator_revision or (config.model_revision if config.generator_model is None else None)
    if (name, revision) == (config.model, config.model_revision):
        model, tokenizer = opened.model, opened.tokenizer
    else:
        model, tokenizer = open_model(name, revision=revision, dtype=config.dtype, device=config.device)
    if config.writing_mode == "instruct":
        require_chat_template(tokenizer, name)
    return model, tokenizer


def _make_generator(
    config: SynthesizeConfig, writer: tuple[Any, Any], journal: Journal, budget: Budget, key: str | None
) -> Generator:
    if config.generator == "local":
        return LocalGenerator(
            *writer,
            name=config.generator_model or config.model,
            journal=journal,
            budget=budget,
            batch_size=config.batch_size,
            temperature=config.temperature,
            top_p=config.top_p,
        )
    return EndpointGenerator(
        str(config.base_url),
        str(config.generator_model),
        journal=journal,
        budget=budget,
        api_key=key,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
        max_retries=config.max_retries,
        temperature=config.temperature,
        top_p=config.top_p,
        body=config.body(),
        requests_per_minute=config.requests_per_minute,
    )


def _work(
    config: SynthesizeConfig,
    scheduler: Scheduler,
    generator: Generator,
    verifier: Verifier,
    journal: Journal,
    budget: Budget,
    *,
    show_progress: bool,
) -> bool:
    """Ask, verify, ask again, until nothing is left to ask or to spend; whether all was asked."""
    under_way, num_empty = 0, 0
    is_finished = True
    held: Request | None = None
    pending: list[Candidate] = []
    total = sum(target.accept for target in scheduler.targets.values() if target.name != PLAIN)
    bar = tqdm(total=total, desc="accepted", unit="text", disable=not show_progress, leave=False)

    def take(request: Request, answer: Answer) -> None:
        candidate = scheduler.of(request.key).take_answer(request, answer)
        if candidate is not None:
            pending.append(candidate)

    def verify() -> None:
        for candidate, verdict in verifier.verdicts(pending, journal):
            target = scheduler.of(candidate.key)
            before = len(target.accepted)
            target.take_verdict(candidate, verdict, config.min_activation)
            bar.update(len(target.accepted) - before)
        pending.clear()
        bar.set_postfix_str(f"{budget.num_requests} requests, {budget.num_tokens} tokens", refresh=False)

    with bar:
        while True:
            while under_way < generator.slots and len(pending) < config.batch_size:
                request = held or scheduler.next_request()
                held = None
                if request is None:
                    break
                known = journal.answers.get(request.key)
                if known is not None:
                    take(request, known)
                elif not is_finished:
                    # The budget has ended: what is in the journal is still gone through, nothing else is asked.
                    continue
                elif budget.take(request.may_use):
                    generator.submit(request)
                    under_way += 1
                else:
                    held = request
                    break
            if pending:
                verify()
            elif under_way:
                for request, answer in generator.collect():
                    under_way -= 1
                    if answer is None:
                        is_finished = False
                        continue
                    num_empty = num_empty + 1 if answer.failure in ("empty", "malformed") else 0
                    take(request, answer)
                if num_empty >= _MOST_EMPTY and config.generator == "endpoint":
                    raise EndpointError(
                        f"The last {num_empty} answers held no text, although they used tokens. Raise "
                        f"`--max-new-tokens`, or turn the model's thinking off by `--extra-body`, and go on with "
                        f"another `--output`."
                    )
            elif held is not None:
                held, is_finished = None, False
            else:
                return is_finished


def _result(
    config: SynthesizeConfig,
    features: FeatureSet,
    start: Start,
    targets: Mapping[str, Target],
    prompts_from: Mapping[str, str],
    journal: Journal,
    folder: Path,
    generator: str,
    is_finished: bool,
) -> Synthesis:
    rows, gained = _rows(config, targets, journal, generator)
    before = start.coverage(config)
    after = before.plus(gained, len(rows))
    plain = [journal.verdicts[key] for key in _read(targets, PLAIN, journal)]
    labels = {one.id: one.label for one in features.features}
    filled = []
    for one in start.to_fill(config):
        target = targets[str(one)]
        verdicts = [journal.verdicts[key] for key in _read(targets, str(one), journal)]
        matched = [verdict.matched for verdict in verdicts if verdict.matched is not None]
        filled.append(
            Filled(
                feature=one,
                label=labels[one],
                before=before.counts[one],
                after=after.counts[one],
                accepted=len(target.accepted),
                outcomes={name: target.count(name) for name in dict.fromkeys(target.outcomes.values())},
                prompts_from=prompts_from[str(one)],
                fire_rate=_mean([verdict.activation > config.min_activation for verdict in verdicts]),
                matched_rate=_mean(matched),
                plain_rate=_mean([str(one) in verdict.fires for verdict in plain]),
                requests=sum(1 for key in journal.answers if key.split("/", 1)[0] == str(one)),
            )
        )
    shares = [_mean([str(one.feature) in verdict.fires for one in filled]) for verdict in plain]
    left = {"requests": max(0, config.max_requests - journal.num_requests)}
    if config.max_tokens is not None:
        left["tokens"] = max(0, config.max_tokens - journal.num_tokens)
    return Synthesis(
        output=folder,
        min_activation=config.min_activation,
        before=before,
        after=after,
        filled=filled,
        rows=rows,
        num_plain=len(plain),
        plain_error=_error_of_mean(shares),
        spent={"requests": journal.num_requests, "failed": journal.num_retries, "tokens": journal.num_tokens},
        left=left,
        generator=generator,
        is_finished=is_finished,
    )


def _read(targets: Mapping[str, Target], name: str, journal: Journal) -> list[str]:
    """Keys of a target's responses that were read."""
    if name not in targets:
        return []
    keys = (f"{name}/response {index}" for index in sorted(targets[name].outcomes))
    return [key for key in keys if key in journal.verdicts and journal.verdicts[key].tokens > 0]


def _rows(
    config: SynthesizeConfig, targets: Mapping[str, Target], journal: Journal, generator: str
) -> tuple[list[dict[str, Any]], dict[FeatureId, int]]:
    """The accepted texts, each once, and how many of them fire each feature."""
    rows: list[dict[str, Any]] = []
    gained: dict[FeatureId, int] = {}
    seen: set[str] = set()
    for target in targets.values():
        for _, one in sorted(target.accepted.items()):
            text = whole_text(config, one)
            if normalised(text) in seen:
                continue
            seen.add(normalised(text))
            verdict = journal.verdicts[one.key]
            for name in verdict.fires:
                feature = FeatureId.parse(name)
                gained[feature] = gained.get(feature, 0) + 1
            rows.append(
                {
                    "text": text,
                    "prompt": one.prompt,
                    "response": one.response,
                    "feature": target.name,
                    "activation": verdict.activation,
                    "fires": list(verdict.fires),
                    "generator": generator,
                    "mode": config.writing_mode,
                    "template": target.recipe.template.name if config.writing_mode == "instruct" else "",
                    "seed": seed_of(config.seed, one.key),
                    "key": one.key,
                }
            )
    return rows, gained


def _error_of_mean(values: list[Any]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5)


def _mean(values: list[Any]) -> float | None:
    return sum(values) / len(values) if values else None
