"""`qscope doctor`: read the texts, open model, SAEs and what is compared with them, diagnose, write, show."""

from __future__ import annotations

from typing import Any

from qscope_trl.activations.chat import chat_renderer
from qscope_trl.activations.opening import open_all
from qscope_trl.activations.row_sources import RowSource
from qscope_trl.activations.sources import open_source, text_of
from qscope_trl.analysis.doctor.diagnosis import diagnose
from qscope_trl.analysis.doctor.report import format_text, write_html, write_json
from qscope_trl.analysis.doctor.result import Diagnosis
from qscope_trl.analysis.doctor.tuned import open_tuned
from qscope_trl.config.doctor import DoctorConfig
from qscope_trl.errors import DataError
from qscope_trl.features import FeatureSet


def run(config: DoctorConfig) -> Diagnosis:
    """Diagnose as the settings say; writes `config.json` and `config.report`.

    Returns:
        The diagnosis; `exit_code` is 0 (fits), 1 (doubtful) or 3 (does not fit).

    Raises:
        CheckpointError: If the SAEs cannot be read.
        ConfigError: If a model or adapter cannot be loaded.
        DataError: If the texts cannot be read, or none has a token after position 0.
        FeatureSetError: If the FeatureSet cannot be read.
        ModelStructureError: If the tuned model is no version of the model.
    """
    source = _open_texts(config)
    features = None if config.features is None else FeatureSet.load(config.features)
    model, tokenizer, saes, layers = open_all(config)
    texts, is_chat = read_texts(source, config, tokenizer)
    tuned, name = None, None
    if config.tuned is not None or config.adapter is not None:
        name = config.tuned or config.model
        tuned = open_tuned(
            name,
            config.adapter,
            revision=config.tuned_revision if config.tuned is not None else config.model_revision,
            dtype=config.tuned_dtype or config.dtype,
            device=config.device,
        )
        name = name if config.adapter is None else f"{name} + {config.adapter}"
    result = diagnose(
        model,
        tokenizer,
        saes,
        texts,
        layers=layers,
        tuned=tuned,
        features=features,
        max_length=config.max_length,
        batch_size=config.batch_size,
        probe_tokens=config.probe_tokens,
        scan=config.scan,
        layers_at_once=config.layers_at_once,
        seed=config.seed,
        is_chat=is_chat,
        model_name=config.model,
        saes_name=config.saes,
        tuned_name=name or "",
    )
    if config.json is not None:
        write_json(result, config.json)
    if config.report is not None:
        write_html(result, config.report)
    return result


def _open_texts(config: DoctorConfig) -> RowSource:
    """The data, with its first row looked at: a wrong column is told before a model is loaded."""
    source = open_source(
        config.data,
        split=config.data_split,
        config=config.data_config,
        revision=config.data_revision,
        streaming=True,
    )
    for index, row in source.rows():
        text_of(row, text_column=config.text_column, source_name=source.name, index=index, chat=lambda _: "")
        break
    return source


def read_texts(source: RowSource, config: DoctorConfig, tokenizer: Any) -> tuple[list[str], bool]:
    """The first texts of the data that are not blank, conversations by the tokenizer's chat template.

    Args:
        source: The data.
        config: Column and number of texts.
        tokenizer: A transformers tokenizer.

    Returns:
        The texts, and whether any was a conversation.

    Raises:
        DataError: If there is none, the data cannot be read, or conversations meet a tokenizer without a template.
    """
    render = chat_renderer(tokenizer, name=config.model)
    rendered = 0

    def chat(messages: list[Any]) -> str:
        nonlocal rendered
        rendered += 1
        return render(messages)

    texts: list[str] = []
    for index, row in source.rows():
        text = text_of(row, text_column=config.text_column, source_name=source.name, index=index, chat=chat)
        if text.strip():
            texts.append(text)
        if len(texts) == config.max_texts:
            break
    if not texts:
        raise DataError(f"'{config.data}' holds no text: every row is blank or there is none.")
    return texts, rendered > 0


def format_result(result: Diagnosis) -> str:
    """The diagnosis as text for the terminal."""
    return format_text(result)
