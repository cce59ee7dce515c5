"""The cost study of ApproxKMV as printed: evaluations against n, and the exponents fitted to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from approxkmv.config import Study
from approxkmv.errors import ConfigError
from approxkmv.files import write_csv, write_json
from approxkmv.kmv.complexity import fit_exponents, measure_costs


def count(study: Study, counts_out: Path, fits_out: Path, provenance: dict[str, Any]) -> None:
    """Write the counts, the fits, and the record of how they were made. Raises ConfigError if the study has none."""
    if study.complexity is None:
        raise ConfigError(f"study {study.name} has no complexity part: add `complexity: {{}}` to it")
    settings = study.complexity
    table = measure_costs(settings.sizes, seeds=settings.seeds, epsilon=settings.epsilon, rows=settings.rows)
    write_csv(counts_out, table)
    write_csv(fits_out, fit_exponents(table))
    write_json(counts_out.with_suffix(".json"), provenance | {"settings": settings.model_dump()})
