"""The cards that are measured on: their peak rates, and where their results are kept."""

import dataclasses
import pathlib
import re

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Card:
    """Every floor on a card is computed from these two rates, whatever a run reaches."""

    kind: str  # as JAX names it
    name: str
    flops: float  # bf16, a second
    bytes: float  # read from memory, a second


H200 = Card("NVIDIA H200", "H200", 780e12, 4.55e12)
H100 = Card("NVIDIA H100 80GB HBM3", "H100", 780e12, 3.08e12)


def card_of(device):
    """The card of `device`, which is a kind or a text that begins with one and a comma.

    An unknown card has the rates of an H200.
    """
    kind = device.split(",")[0]
    unknown = dataclasses.replace(H200, kind=kind, name=kind)
    return next((card for card in (H200, H100) if card.kind == kind), unknown)


def results_path(kind, suffix=""):
    """Where the results of a kind of device go: results/h200.json for an H200."""
    name = re.sub(r"\W+", "_", card_of(kind).name.lower())
    return FOLDER / f"{name}{suffix}.json"
