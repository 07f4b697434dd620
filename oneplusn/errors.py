"""Every exception that a caller or an upload can cause, in one tree.

    OneplusnError
    ├── AdapterError                     an upload, a version or its place in memory
    │   ├── AdapterNotFound        404   adapter_not_found
    │   ├── AdapterInvalid         422   adapter_invalid, or a narrower code per instance
    │   ├── AdapterIncompatible    422   adapter_incompatible
    │   ├── AdapterMediaType       415   pickle_rejected
    │   ├── AdapterExists          409   adapter_exists
    │   ├── PoolExhausted          503   adapter_memory_exhausted, retryable
    │   ├── AdapterTooLarge        413   upload_too_large
    │   ├── AdapterConflict        409   a narrower code per instance, as adapter_pinned
    │   ├── GenerationMismatch     412   generation_mismatch
    │   ├── AdapterCorrupt         503   adapter_corrupt
    │   └── RegistryBusy           503   registry_busy, retryable
    ├── ServingError                     a request
    │   ├── InvalidRequest         400   invalid_value
    │   ├── InvalidKey             401   invalid_api_key
    │   ├── HostNotAllowed         421   host_not_allowed
    │   ├── UnknownTask            404   model_not_found
    │   ├── PromptTooLong          400   context_length_exceeded
    │   ├── QueueFull              429   queue_full, retryable
    │   ├── RequestCancelled       499   request_cancelled
    │   ├── DeadlineExceeded       504   deadline_exceeded
    │   ├── EngineStopped          503   engine_stopped, retryable
    │   │   └── EngineGone         503   engine_dead
    │   ├── StorageFull            507   storage_full
    │   └── WorkerFailed           503   worker_timeout, worker_memory, worker_failed, …
    └── StartupError                     the process refuses to start; never an answer to a request
        ├── ConfigError                  config_error
        ├── ModelRefused                 model_refused
        └── MemoryPlanRefused            memory_plan_refused

The classes carry what an HTTP answer needs (`status_code`, `code`, `type`, `retryable`, `param`),
and one handler in the server turns any of them into OpenAI's error body. A message holds the bad
value, the limit and the way out.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar


class OneplusnError(Exception):
    """Base of the tree.

    Attributes:
        status_code: HTTP status of the answer.
        type: Error family in OpenAI's vocabulary.
        retryable: Whether the same request can succeed later.
        code: Stable, machine-readable reason; a class default that an instance may narrow.
        param: Name of the request field at fault, if one is.
    """

    status_code: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False
    code: str = "internal_error"
    param: str | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        """Keep the message; narrow `code` and `param` where the class default is too wide."""
        super().__init__(message)
        if code is not None:
            self.code = code
        if param is not None:
            self.param = param

    @property
    def message(self) -> str:
        """The text for the caller."""
        return str(self.args[0])


class AdapterError(OneplusnError):
    """Something is wrong with an adapter."""

    status_code = 422
    type = "invalid_request_error"
    code = "adapter_error"


class AdapterNotFound(AdapterError):
    """No adapter, version or alias has this name."""

    status_code = 404
    code = "adapter_not_found"


class AdapterInvalid(AdapterError):
    """The upload cannot be served by any base; `code` may say more, as `dora_not_supported`."""

    code = "adapter_invalid"


class AdapterIncompatible(AdapterError):
    """The adapter is sound, but made for another base model."""

    code = "adapter_incompatible"


class AdapterMediaType(AdapterError):
    """The weights come in a format that could run code; only safetensors is read."""

    status_code = 415
    code = "pickle_rejected"


class AdapterExists(AdapterError):
    """The name is taken, by an adapter or by a task of another active adapter."""

    status_code = 409
    type = "conflict_error"
    code = "adapter_exists"


class PoolExhausted(AdapterError):
    """The adapter does not fit beside those that are pinned or in use."""

    status_code = 503
    type = "server_error"
    retryable = True
    code = "adapter_memory_exhausted"


class ServingError(OneplusnError):
    """A request cannot be served."""

    code = "serving_error"


class InvalidRequest(ServingError):
    """A field of the request has a value that is not allowed."""

    status_code = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidKey(ServingError):
    """The request has no API key, or not this server's."""

    status_code = 401
    type = "authentication_error"
    code = "invalid_api_key"


class HostNotAllowed(ServingError):
    """The request was sent to a name that is not this server's."""

    status_code = 421
    type = "invalid_request_error"
    code = "host_not_allowed"


class UnknownTask(ServingError):
    """No active adapter has this task, and the base model has another name."""

    status_code = 404
    type = "invalid_request_error"
    code = "model_not_found"
    param = "model"


class PromptTooLong(ServingError):
    """Prompt and completion together exceed what the model or the cache can hold."""

    status_code = 400
    type = "invalid_request_error"
    code = "context_length_exceeded"


class QueueFull(ServingError):
    """Too many requests wait already."""

    status_code = 429
    type = "overloaded_error"
    retryable = True
    code = "queue_full"


class RequestCancelled(ServingError):
    """The client went away, or someone cancelled the request."""

    status_code = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class DeadlineExceeded(ServingError):
    """The request's own `timeout` passed before its answer was complete."""

    status_code = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineStopped(ServingError):
    """The engine is starting, draining or restarting."""

    status_code = 503
    type = "overloaded_error"
    retryable = True
    code = "engine_stopped"


class EngineGone(EngineStopped):
    """The engine cannot be kept running; only a restart of the server helps."""

    type = "server_error"
    retryable = False
    code = "engine_dead"


class StartupError(OneplusnError):
    """The process cannot start as configured."""

    code = "startup_error"


class ConfigError(StartupError):
    """A setting is unknown, malformed or contradicts another."""

    code = "config_error"


class ModelRefused(StartupError):
    """The base model failed its probe, so its answers would be wrong."""

    code = "model_refused"


class MemoryPlanRefused(StartupError):
    """Weights, adapters and KV cache do not fit into the budgets."""

    code = "memory_plan_refused"


class AdapterTooLarge(AdapterError):
    """An upload, an archive as it expands, or the pages that it needs exceed a limit."""

    status_code = 413
    code = "upload_too_large"


class AdapterConflict(AdapterError):
    """The adapter's state forbids it: it is pinned, active, or has no version to go back to."""

    status_code = 409
    type = "conflict_error"
    code = "adapter_conflict"


class GenerationMismatch(AdapterError):
    """Someone else has changed the adapter since the caller looked at it."""

    status_code = 412
    type = "conflict_error"
    code = "generation_mismatch"
    param = "if-match"


class AdapterCorrupt(AdapterError):
    """Its files are damaged on the disk; the other adapters are served."""

    status_code = 503
    type = "server_error"
    code = "adapter_corrupt"


class RegistryBusy(AdapterError):
    """Another process holds the registry's database."""

    status_code = 503
    type = "server_error"
    retryable = True
    code = "registry_busy"


class StorageFull(ServingError):
    """The disk of the data folder is full; what was there before is untouched."""

    status_code = 507
    code = "storage_full"


class WorkerFailed(ServingError):
    """A job could not be done; `code` says what failed.

    `worker_timeout` and `worker_memory`: it took more than it may. `worker_crashed`: it broke
    its process, which was replaced. `worker_failed`: a fault of ours. `worker_unavailable`: there
    was no process to do it.
    """

    status_code = 503
    code = "worker_failed"


def rebuild(
    kind: str, message: str, *, code: str | None = None, param: str | None = None
) -> OneplusnError:
    """Make an error again that another process named by its class."""
    return _classes(OneplusnError)[kind](message, code=code, param=param)


def adapter_error(message: str, code: str | None) -> AdapterError:
    """Make an `AdapterError` again that another process named by its code."""
    found = (cls for cls in _classes(AdapterError).values() if cls.code == code)
    return next(found, AdapterError)(message, code=code)


ErrorClass = TypeVar("ErrorClass", bound=OneplusnError)


def _classes(root: type[ErrorClass]) -> dict[str, type[ErrorClass]]:
    """Return a class of the tree and all below it, by name."""
    found = {root.__name__: root}
    for cls in root.__subclasses__():
        found.update(_classes(cls))
    return found
