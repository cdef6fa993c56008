"""What `GET /metrics` answers, as numbers by name and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICES = ("router", "memory", "compute")


@dataclass(frozen=True)
class Scrape:
    """One answer. Keys are names with the values of their labels, such as `quire_pool_blocks/free`."""

    values: dict[str, float]
    rising: frozenset[str]  # keys of counters and histograms

    def __getitem__(self, key: str) -> float:
        return self.values[key]

    @property
    def names(self) -> set[str]:
        """Names of the samples, without labels."""
        return {key.partition("/")[0] for key in self.values}

    def family(self, name: str) -> dict[str, float]:
        """The samples of a metric with one label, by its value."""
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): value
            for key, value in self.values.items()
            if key.startswith(prefix)
        }


def scrape(address: str) -> Scrape:
    with urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    rising: set[str] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = "/".join((sample.name, *sample.labels.values()))
            assert key not in values
            values[key] = sample.value
            if family.type in {"counter", "histogram"}:
                rising.add(key)
    return Scrape(values, frozenset(rising))


def scrape_all(addresses: Mapping[str, str]) -> dict[str, Scrape]:
    """All three services of a `quire up`."""
    return {name: scrape(addresses[f"{name}_metrics"]) for name in SERVICES}
