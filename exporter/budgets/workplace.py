"""What a planner has found out and a later call can use: fits, costs, damages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import CalibrationRef, ModelRef
from exporter.budgets.gains import Name
from exporter.files import sha256_bytes, sha256_file, staged_directory

if TYPE_CHECKING:
    from exporter.healing import Fit

_FITS = "fits"


@dataclass(frozen=True)
class Workplace:
    """A folder that outlives an interrupted call; each thing in it says what it is about.

    Attributes:
        folder: Where it is; made when something is kept.
    """

    folder: Path

    @property
    def costs(self) -> Path:
        """Measured times of sublayers."""
        return self.folder / "costs.json"

    @property
    def journal(self) -> Path:
        """Measured damages."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "damages.jsonl"

    def keep_fits(self, about: Mapping[str, Any], fits: Mapping[Name, Fit]) -> None:
        """Writes fits down, whole or not at all."""
        from safetensors.torch import save_file

        with staged_directory(self.folder / _FITS) as stage:
            tensors, notes = {}, []
            for (layer, kind), fit in fits.items():
                tensors[f"{kind}.{layer}.mean"] = fit.bias.bias
                tensors[f"{kind}.{layer}.bias"] = fit.linear.bias
                for number, weight in enumerate(fit.linear.maps):
                    tensors[f"{kind}.{layer}.map{number}"] = weight
                explained = fit.bias_explained, fit.linear_explained
                notes.append([layer, kind, len(fit.linear.maps), fit.ridge, *explained])
            held = {name: t.contiguous().clone() for name, t in tensors.items() if t is not None}
            save_file(held, stage / "fits.safetensors")
            sha256 = sha256_file(stage / "fits.safetensors")
            told = {"about": dict(about), "fits": notes, "sha256": sha256}
            (stage / "fits.json").write_text(json.dumps(told), encoding="utf-8")

    def kept_fits(self, about: Mapping[str, Any]) -> dict[Name, Fit] | None:
        """The fits that were kept; None where there are none, or none about this."""
        file = self.folder / _FITS / "fits.safetensors"
        try:
            told = json.loads(file.with_name("fits.json").read_text(encoding="utf-8"))
            if told["about"] != dict(about) or told["sha256"] != sha256_file(file):
                return None
            return _read(file, told["fits"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _read(file: Path, notes: list[Any]) -> dict[Name, Fit]:
    from safetensors.torch import load_file

    from exporter.ablation import Substitute
    from exporter.healing import Fit

    held = load_file(file)
    found: dict[Name, Fit] = {}
    for layer, kind, maps, ridge, bias_explained, linear_explained in notes:
        name = f"{kind}.{layer}"
        weights = tuple(held[f"{name}.map{number}"] for number in range(maps))
        found[layer, kind] = Fit(
            bias=Substitute(held[f"{name}.mean"]),
            linear=Substitute(held[f"{name}.bias"], weights),
            ridge=ridge,
            bias_explained=bias_explained,
            linear_explained=linear_explained,
        )
    return found


def about_fits(
    model: ModelRef, dtype: str, text: CalibrationRef, rank: int | None
) -> dict[str, Any]:
    """What fits depend on."""
    told = text.model_dump_json()
    return {
        "model": model.sha256,
        "dtype": dtype,
        "text": sha256_bytes(told.encode()),
        "rank": rank,
    }
