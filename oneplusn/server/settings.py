"""Every setting of the server: one frozen object, four sources.

Precedence: command line, then environment (`ONEPLUSN_<NAME>`), then the file given by `--config`
(YAML or TOML), then the default. `docs/settings.md` lists what is declared here, and a test
compares the two.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from oneplusn.errors import ConfigError
from oneplusn.server.host import free_cores

ENV_PREFIX = "ONEPLUSN_"
# What the engine's process is told, and what commands take that load a model without a server.
MODEL_SETTINGS = ("model", "revision", "device", "dtype", "quantize", "threads")
ENGINE_SETTINGS = (
    *MODEL_SETTINGS,
    "kv_memory",
    "adapter_memory",
    "max_model_len",
    "max_num_seqs",
    "token_budget",
    "max_adapters",
)
REFUSED = {
    "trust_remote_code": (
        "trust_remote_code is not supported: a model's own Python code is never run; "
        "use an architecture that transformers ships"
    ),
}


class Settings(BaseSettings):
    """How one server is run. Read once at start, never changed."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: str = Field("demo", description="Base model: `demo`, a folder, or a model hub id.")
    revision: str | None = Field(
        None, description="Commit, tag or branch of the hub id; the hub's default otherwise."
    )
    served_model_name: str | None = Field(
        None,
        description="Name of the base in requests; the last part of `model` otherwise.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 picks a free one.")
    api_key_file: Path | None = Field(
        None,
        description=(
            "File with the key that every request but health must bring; `ONEPLUSN_API_KEY` holds "
            "the key itself. Without a key, `host` must be a loopback address."
        ),
    )
    data: Path | None = Field(
        None,
        description=(
            "Folder that keeps uploaded adapters. Without one they live in a temporary folder "
            "and end with the process."
        ),
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; `auto` takes CUDA when there is one."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description=(
            "Type of weights and arithmetic; `auto` keeps bfloat16 files in bfloat16 where the "
            "processor multiplies it in hardware, and takes float32 otherwise."
        ),
    )
    quantize: Literal["none", "int8"] = Field(
        "none",
        description=(
            "What the base's linear layers keep their weights in; `int8` has 8 bits each and a "
            "scale for every output, and is for the CPU."
        ),
    )
    threads: int = Field(
        default_factory=free_cores,
        ge=1,
        le=1024,
        description="Threads of the arithmetic; by default the cores that are free at the start.",
    )
    kv_memory: ByteSize | None = Field(
        None,
        gt=0,
        description=(
            "Bytes for the KV cache, for example 2GiB; otherwise enough for `max_num_seqs` "
            "sequences of a quarter of the context, within a quarter of the free memory."
        ),
    )
    adapter_memory: ByteSize | None = Field(
        None,
        gt=0,
        description=(
            "Bytes for resident adapters and the copies packed from them, two to three times their "
            "files, for example 512MiB; otherwise 1GiB, within 15 % of the free memory."
        ),
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt plus completion, in tokens; the model's own limit otherwise.",
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="Sequences computed in one step.")
    token_budget: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description=(
            "Tokens computed in one step, prompts included: what a prompt may hold the others up "
            "by; otherwise twice `max_num_seqs`, and 128 at least."
        ),
    )
    max_adapters: int | None = Field(
        None,
        ge=1,
        description="Distinct adapters computed in one step; as many as there are otherwise.",
    )
    max_queue: int = Field(
        1024, ge=1, description="Sequences accepted and unfinished; beyond it requests get 429."
    )
    max_connections: int = Field(
        2048,
        ge=1,
        description=(
            "Connections open at once; requests on one more get 503, but for health and metrics."
        ),
    )
    max_body: ByteSize = Field(
        ByteSize(8 << 20), gt=0, description="Bytes of a JSON request; larger ones get 413."
    )
    max_upload: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="Bytes of an adapter upload, packed and unpacked."
    )
    max_image: ByteSize = Field(
        ByteSize(4 << 30),
        gt=0,
        description=(
            "Bytes of one adapter as the engine holds it, in memory and on the disk; larger ones "
            "get 413."
        ),
    )
    header_timeout: float = Field(
        10,
        gt=0,
        le=3600,
        description="Seconds that the head of a request may take; one that takes longer gets 408.",
    )
    body_timeout: float = Field(
        30,
        gt=0,
        le=3600,
        description=(
            "Seconds in which a body must bring 1 KiB for each of them, or its end; one that is "
            "slower gets 408."
        ),
    )
    write_timeout: float = Field(
        30,
        gt=0,
        le=3600,
        description="Seconds after which a client that reads nothing of its answer is cut.",
    )
    adapter: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict,
        description="Adapters to register at start: NAME=PATH, repeatable or comma-separated.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe message that is written."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines as key=value pairs or as one JSON object each."
    )
    tool_parser: Literal["hermes", "llama3"] | None = Field(
        None, description="How the model writes calls of tools; otherwise its chat template tells."
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description="Whose names metrics have besides our own, for inference gateways."
    )
    step_timeout: float = Field(
        30,
        gt=0,
        le=3600,
        description="Seconds without a step, while one is due, before the engine is restarted.",
    )
    worker_idle_timeout: float = Field(
        60,
        gt=0,
        description=(
            "Seconds that a process for uploads or grammars is kept without work: each holds 230 "
            "to 300 MB, and takes about two seconds to start again."
        ),
    )
    shutdown_timeout: int = Field(
        30, ge=0, le=3600, description="Seconds that requests in flight get after SIGTERM."
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _parse_adapters(cls, value: object) -> object:
        """Turn `NAME=PATH` items into a mapping."""
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            return value
        pairs = [str(item).partition("=") for item in items if str(item)]
        bad = next((name for name, sign, path in pairs if not (name and sign and path)), None)
        if bad is not None:
            msg = f"expected NAME=PATH, not {bad!r}"
            raise ValueError(msg)
        names = [name for name, _, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            msg = f"the name {twice!r} is given twice"
            raise ValueError(msg)
        return {name: path for name, _, path in pairs}

    @property
    def base_name(self) -> str:
        """Name that requests use for the base model."""
        return self.served_model_name or Path(self.model).name


def load_settings(given: Mapping[str, object], *, config: Path | None = None) -> Settings:
    """Merge the sources into one object.

    Args:
        given: What the command line named, and only that.
        config: Settings file; `ONEPLUSN_CONFIG` otherwise.

    Raises:
        ConfigError: A setting is unknown, refused or malformed, or the file cannot be read.
    """
    path = config or os.environ.get(f"{ENV_PREFIX}CONFIG")
    from_file = _read_config(Path(path)) if path else {}
    from_env = {name.removeprefix(ENV_PREFIX).lower() for name in os.environ}
    for name, why in REFUSED.items():
        if name in given or name in from_file or name in from_env:
            raise ConfigError(why, param=name)

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    try:
        merged = Sourced(**dict(given))  # type: ignore[arg-type]  # checked right here
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    return Settings.model_construct(
        **{name: getattr(merged, name) for name in Settings.model_fields}
    )


def shown_default(name: str) -> str:
    """Write a setting's default as help and documentation show it."""
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return "none" if name == "adapter" else "the machine's"
    if isinstance(field.default, ByteSize):
        return field.default.human_readable(separator="")
    return "none" if field.default is None else str(field.default)


def _read_config(path: Path) -> dict[str, Any]:
    """Read a YAML or TOML file of settings.

    Raises:
        ConfigError: The file is missing or malformed, or a key is not a setting.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loaded = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        msg = f"cannot read the settings file {path}: {error}"
        raise ConfigError(msg) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        msg = f"{path} holds {type(loaded).__name__}, not `name: value` pairs"
        raise ConfigError(msg)
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    for key in values:
        if key not in Settings.model_fields and key not in REFUSED:
            raise ConfigError(f"{path}: unknown setting {key!r}{_suggest(key)}", param=key)
    return values


def _suggest(key: str) -> str:
    """Name the settings that look like `key`."""
    close = difflib.get_close_matches(key, Settings.model_fields, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "; see oneplusn serve --help"


def _explain(error: ValidationError) -> str:
    """Say in one line which settings are wrong, with the value and the reason."""
    reasons = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        reason = item["msg"].removeprefix("Value error, ")
        flag = f"--{name.replace('_', '-')} (or {ENV_PREFIX}{name.upper()})"
        reasons.append(f"{flag} = {item['input']!r}: {reason}")
    return "; ".join(reasons)
