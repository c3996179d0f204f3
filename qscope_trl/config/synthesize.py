"""Settings of `qscope synthesize`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from qscope_trl.config.encoding import EncodingConfig
from qscope_trl.config.values import at_least, one_of
from qscope_trl.errors import ConfigError
from qscope_trl.files import check_output

FILL = ("missing", "weak")
GENERATORS = ("local", "endpoint", "none")
MODES = ("continue", "instruct")
ENCODE_AS = ("text", "chat")

# What a request to an endpoint says anyway, and what would change the shape of its answer.
_NOT_IN_BODY = ("model", "messages", "prompt", "stream", "n")

# Settings that decide how a run goes, not what comes out: they may differ when it is resumed.
MAY_CHANGE = (
    "output",
    "resume",
    # Names of files; what they hold is compared.
    "features",
    "data",
    "store",
    "examples",
    "prompts",
    "template",
    # How much is asked for, and how.
    "accept",
    "attempts",
    "max_requests",
    "max_tokens",
    "batch_size",
    "device",
    "concurrency",
    "requests_per_minute",
    "timeout",
    "max_retries",
    "base_url",
    "api_key_env",
)


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig(EncodingConfig):
    """Settings of `qscope synthesize`."""

    layers: str = field(
        default="all",
        metadata={"help": "Layers whose features to use: `26,27`, `20-27`, or `all` of the feature file."},
    )
    features: str = field(
        metadata={"help": "Feature file with the targets and their labels, as `qscope find` writes."}
    )
    output: str = field(metadata={"help": "Folder to make, for the journal, the texts and the coverage."})
    data: str | None = field(
        default=None,
        metadata={"help": "Dataset whose coverage counts: Hub id, local file or folder, or `demo:NAME`."},
    )
    store: str | None = field(default=None, metadata={"help": "Instead: its feature store, made by `qscope index`."})
    text_column: str = field(
        default="text", metadata={"help": "Column of the texts; `prompt+completion` joins several."}
    )
    data_split: str | None = field(default=None, metadata={"help": "Split of the dataset."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of the dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read a Hub dataset as it is downloaded."})
    max_rows: int | None = field(default=None, metadata={"help": "Read this many rows of the data, its first ones."})
    min_activation: float = field(
        default=0.0, metadata={"help": "A feature fires in a text where its activation exceeds this."}
    )
    weak_below: int = field(
        default=5, metadata={"help": "A feature that fires in fewer texts than this is weak; in none, missing."}
    )
    fill: str = field(
        default="missing",
        metadata={"help": "Features to generate texts for: the `missing`, or all `weak` ones.", "choices": list(FILL)},
    )
    generator: str = field(
        default="local",
        metadata={
            "help": "What writes texts: a `local` transformers model, an OpenAI-compatible `endpoint`, or `none`, "
            "which only measures coverage.",
            "choices": list(GENERATORS),
        },
    )
    generator_model: str | None = field(
        default=None,
        metadata={"help": "Model that writes: as the endpoint calls it, or Hub id or folder. Default: `--model`."},
    )
    generator_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a local one."})
    mode: str | None = field(
        default=None,
        metadata={
            "help": "`instruct`: it is asked for prompts, then answers them. `continue`: it goes on from beginnings, "
            "as base models can. Default: `instruct` through an endpoint, `continue` with a local model.",
            "choices": list(MODES),
        },
    )
    template: str | None = field(
        default=None, metadata={"help": "With `instruct`: own templates, YAML, or plain text for the one of prompts."}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "Dataset of prompts, or beginnings, to use instead; with a column `feature`, each for its own."
        },
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of `--prompts`."})
    examples: str | None = field(
        default=None,
        metadata={"help": "Dataset in which the features do fire: their top texts are examples, or beginnings."},
    )
    examples_column: str = field(default="text", metadata={"help": "Column of `--examples`."})
    num_examples: int = field(default=4, metadata={"help": "Top texts for each feature."})
    max_example_rows: int | None = field(default=None, metadata={"help": "Read this many rows of `--examples`."})
    prefix_tokens: int = field(
        default=32, metadata={"help": "With `continue`: tokens of a beginning, the last before the feature's peak."}
    )
    accept: int = field(default=4, metadata={"help": "Texts to accept for each feature."})
    attempts: int = field(default=16, metadata={"help": "Texts to try for each feature."})
    prompts_per_request: int = field(default=8, metadata={"help": "Prompts that one request asks for."})
    rewrite: bool = field(default=False, metadata={"help": "With `instruct`: have each prompt rewritten once more."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens of a response."})
    max_prompt_tokens: int = field(default=512, metadata={"help": "Tokens of an answer that writes prompts."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    seed: int = field(default=0, metadata={"help": "Decides samples and controls."})
    encode_as: str = field(
        default="text",
        metadata={
            "help": "How prompt and response are read by the model: as plain `text`, or by its `chat` template.",
            "choices": list(ENCODE_AS),
        },
    )
    control_requests: int = field(
        default=20,
        metadata={"help": "Texts generated without a target, to compare with; they count in the budget. 0: none."},
    )
    max_requests: int = field(default=1000, metadata={"help": "Budget: requests in all, retries included."})
    max_tokens: int | None = field(default=None, metadata={"help": "Budget: tokens in all, of requests and answers."})
    base_url: str | None = field(
        default=None, metadata={"help": "URL of the endpoint, such as http://localhost:8000/v1."}
    )
    api_key_env: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the endpoint's key. By default no key is sent."},
    )
    extra_body: str | None = field(
        default=None,
        metadata={"help": 'More fields of each request, as JSON: {"top_k": 20}. null leaves one out: {"seed": null}.'},
    )
    concurrency: int = field(default=4, metadata={"help": "Requests to an endpoint in flight at a time."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "Requests to start in a minute."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for an answer."})
    max_retries: int = field(default=5, metadata={"help": "Times to send a request again that failed for the moment."})
    resume: bool = field(
        default=False, metadata={"help": "Go on where the journal in `--output` ends; start if there is none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output("output", self.output, is_folder=True)
        one_of("fill", self.fill, FILL)
        one_of("generator", self.generator, GENERATORS)
        one_of("encode_as", self.encode_as, ENCODE_AS)
        if self.mode is not None:
            one_of("mode", self.mode, MODES)
        for name, least in (
            ("max_rows", 1),
            ("max_example_rows", 1),
            ("min_activation", 0),
            ("weak_below", 1),
            ("num_examples", 1),
            ("prefix_tokens", 1),
            ("accept", 1),
            ("attempts", 1),
            ("prompts_per_request", 1),
            ("max_new_tokens", 1),
            ("max_prompt_tokens", 1),
            ("temperature", 0),
            ("control_requests", 0),
            ("max_requests", 1),
            ("max_tokens", 1),
            ("concurrency", 1),
            ("max_retries", 0),
        ):
            at_least(name, getattr(self, name), least)
        for name in ("requests_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` is {value}; it is above 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p}; it is above 0, and 1 at most.")
        if bool(self.data) is bool(self.store):
            raise ConfigError(
                "Give what is to be covered in one way: `--data` (a dataset) or `--store` (its feature store)."
            )
        if self.store and self.max_rows is not None:
            raise ConfigError("`--max-rows` is for `--data`; a store is counted whole.")
        self._check_generator()

    def _check_generator(self) -> None:
        if self.generator == "endpoint":
            if not (self.base_url and self.generator_model):
                raise ConfigError(
                    "`--generator endpoint` needs `--base-url`, such as http://localhost:8000/v1, and "
                    "`--generator-model`, the name that the endpoint knows the model by."
                )
            try:
                url = urlsplit(self.base_url)
                is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            except ValueError:  # A bracket that does not close, or a port that is no number.
                is_address = False
            if not is_address:
                raise ConfigError(f"`base_url` is {self.base_url!r}; it begins with http:// or https:// and a host.")
            if "@" in url.netloc or url.query:
                raise ConfigError(
                    "`base_url` holds a user name, password or query, which would be written to the journal. Put the "
                    "key into an environment variable, and name it by `--api-key-env`."
                )
        elif self.base_url or self.api_key_env or self.extra_body:
            raise ConfigError("`--base-url`, `--api-key-env` and `--extra-body` are for `--generator endpoint`.")
        if self.writing_mode == "continue" and (self.template or self.rewrite):
            raise ConfigError("`--template` and `--rewrite` are for `--mode instruct`.")
        if self.writing_mode == "continue" and self.encode_as == "chat":
            raise ConfigError("`--encode-as chat` is for `--mode instruct`: a continuation has no turns.")
        self.body()

    @property
    def writing_mode(self) -> str:
        """`mode`, or the generator's own."""
        return self.mode or ("instruct" if self.generator == "endpoint" else "continue")

    def body(self) -> dict[str, Any]:
        """The fields that `extra_body` names.

        Raises:
            ConfigError: If it is no JSON object, or holds a field that is not to be set.
        """
        if self.extra_body is None:
            return {}
        try:
            fields = json.loads(self.extra_body)
        except ValueError as err:
            raise ConfigError(f"`extra_body` is {self.extra_body!r}, which is not JSON: {err}.") from err
        if not isinstance(fields, dict):
            raise ConfigError(f"`extra_body` is {self.extra_body!r}; it is a JSON object from field to value.")
        for name in _NOT_IN_BODY:
            if name in fields:
                raise ConfigError(
                    f"`extra_body` sets `{name}`, which is set by other settings or has to stay as it is."
                )
        return fields
