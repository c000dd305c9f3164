"""Word error rate of Whisper base without a third of its decoder's sublayers, on made sentences."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from exporter.artifacts import ComparisonReport
from exporter.report.words import dropped_lines, shape_words
from tests.benchmarks.machine import print_machine

JUDGED, SCORED = 100, 24
_USUAL = ("--drop-joint", "6", "--protect", "encoder")
_WHO = (
    "The old farmer", "My younger sister", "A tall man in a grey coat", "The captain of the ship",
    "Our neighbour", "The teacher", "A group of students", "The doctor", "Her brother",
    "The woman behind the counter", "One of the guards", "The little boy",
)  # fmt: skip
_DOES = (
    "carries", "is looking for", "has forgotten", "wants to sell", "found", "is going to repair",
    "will bring", "never liked", "lost", "paid for", "left", "remembers",
)  # fmt: skip
_WHAT = (
    "three heavy baskets", "the key to the garden", "a letter from London", "the broken window",
    "two bottles of milk", "a very expensive watch", "the map of the island", "an old wooden chair",
    "the red umbrella", "a box full of apples", "the last ticket", "a small brown dog",
)  # fmt: skip
_WHERE = (
    "on the way to the market", "before the train arrives", "in the kitchen of the hotel",
    "since the end of the war", "at the corner of the street", "every Sunday morning",
    "because of the heavy rain", "without telling anybody", "near the bridge over the river",
    "at half past seven", "in the middle of the night", "after the meeting",
)  # fmt: skip


def sentences(number: int, seed: int) -> list[str]:
    """Sentences of everyday words, no two alike."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < number:
        found[" ".join(map(rng.choice, (_WHO, _DOES, _WHAT, _WHERE))) + "."] = None
    return list(found)


def spoken(folder: Path, texts: list[str]) -> Path:
    """Recordings of sentences, and the JSON-lines file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(texts):
        file = folder / f"{number:03}.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(file), text], check=True)
        lines.append(json.dumps({"audio": file.name, "text": text}))
    written = folder / "recordings.jsonl"
    written.write_text("\n".join(lines))
    return written


def main() -> None:
    """Prints the figures."""
    if len(sys.argv) < 3 or shutil.which("espeak-ng") is None:
        print("Left out: no model, or no espeak-ng. See tests/benchmarks/bench_whisper.py.")
        return
    model, out, *options = sys.argv[1:]
    every = sentences(JUDGED + SCORED, 0)
    judged = spoken(Path(out) / "judged", every[:JUDGED])
    scored = spoken(Path(out) / "scored", every[JUDGED:])
    command = [
        *(sys.executable, "-m", "exporter.cli", "export", model, "-o", f"{out}/export"),
        *("--calibration", str(scored), "--eval-text", str(judged), "--time-budget", "20"),
        *("--decode-past", "64", *(options or _USUAL)),
    ]
    subprocess.run(command, check=True)
    print_machine("torch", "transformers", "jiwer")
    show(ComparisonReport.read(Path(out) / "export" / "report.json"))


def show(report: ComparisonReport) -> None:
    """Prints a report's figures as a table."""
    print(f"Dropped: {'; '.join(dropped_lines(report.plan))}.")
    worst = max(check.max_abs_error for check in report.parity)
    print(f"Largest error against PyTorch, both kinds of caches included: {worst:.1e}.")
    print("| figure | whole | cut | difference |\n|---|---:|---:|---:|")
    found = report.accuracy
    assert found is not None
    for task in found.tasks:
        low, high = task.difference.ci95
        told = f"{100 * task.difference.value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        print(f"| WER, %, {task.items} | {100 * task.baseline:.2f} | {100 * task.candidate:.2f} | "
              f"{told} |")  # fmt: skip
    if found.perplexity is not None:
        pair = found.perplexity
        print(f"| perplexity | {pair.baseline:.3f} | {pair.candidate:.3f} | |")
    print(f"| KL divergence, nats | | {found.kl_divergence:.4f} | |")
    print(f"| same likeliest token, % | | {100 * (found.top1_agreement or 0):.1f} | |")
    for row in report.latency:
        low, high = row.speedup.ci95
        print(
            f"| {shape_words(row)}, ms | {row.baseline.median_ms:.2f} | "
            f"{row.candidate.median_ms:.2f} | {row.speedup.ratio:.3f}x [{low:.3f}, {high:.3f}] |"
        )


if __name__ == "__main__":
    main()
