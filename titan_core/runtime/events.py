"""What a run says while it goes on, as values; who listens decides how it looks.

Jobs emit events, the command line draws them, the JSON-lines log stores them. A job never prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """Something the user should know once."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something the user should act on; `rank` names the process when it is not the main one."""

    text: str
    rank: int | None = None


@dataclass(frozen=True)
class Planned:
    """What is about to be done: rows of (topic, text), shown before the work starts."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Phase:
    """A long silent part begins (`compiling`, `tokenizing`, `loading`)."""

    text: str


@dataclass(frozen=True)
class StepDone:
    """One optimizer step that is worth a line.

    `loss` is the token-weighted global mean, `max_loss` the largest mean of a data-parallel rank; `seconds` is the wall
    time a step since the last line, `data_share` the part of it spent waiting for data; rates are per device.
    `mfu` is a fraction of the device's audited peak, None where the device is not known.
    """

    step: int
    steps: int
    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory_gib: float
    memory_share: float | None
    data_share: float
    eta_seconds: float | None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated:
    """Loss on the validation slice: token-weighted mean over `tokens` targets; `parts` are means of
    parts of it, or of what is measured beside it."""

    step: int
    loss: float
    tokens: int
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """Images that show what a model can do by now: files, captions, and pixels (height, width, 3) uint8 each."""

    step: int
    paths: list[str]
    captions: list[str]
    images: list[Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete. `stall` is how long the training thread stood still for it."""

    step: int
    path: str
    bytes: int
    seconds: float
    stall: float


@dataclass(frozen=True)
class Progress:
    """A countable job moved on: `done` of `total` (None: unknown) in `unit`."""

    what: str
    done: float
    total: float | None
    unit: str


@dataclass(frozen=True)
class Text:
    """A piece of generated text, in order."""

    text: str
    sequence: int = 0


Event = Note | Warned | Planned | Phase | StepDone | Validated | Sampled | Saved | Progress | Text
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore an event."""


def as_dict(event: Event) -> dict[str, Any]:
    """Return an event as one flat record, with its kind under `event`."""
    import dataclasses

    return {"event": type(event).__name__.lower(), **dataclasses.asdict(event)}
