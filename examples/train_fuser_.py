"""CLIP-IT with the command line of its own README, on this project's code.

    python examples/train_fuser_.py --ds pcam --model UNI --lora_r 16 --lora_alpha 4 --root /data/pcam --reports tcga:/data/tcga

`docs/reference/clip-it-options.md` says what each option means here and where that differs from the published script.
`chiasm distill` takes the same options, and recipes, which say more; add `--controls` there to see where a gain comes
from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from chiasm.distill.reference import OPTIONS, notes_on, parse_reference, recipe_from_reference
from chiasm.distill.run import distill
from chiasm.errors import ChiasmError
from chiasm.progress import RichProgress


def main(words: Sequence[str]) -> int:
    """Train, test, and say what the published script says; return the exit code."""
    if {"-h", "--help"} & set(words):
        _say(__doc__ or "", *(f"  {option.flag:15} {option.here}" for option in OPTIONS))
        return 0
    try:
        options = parse_reference(words)
        for note in notes_on(options):
            sys.stderr.write(f"warning: {note}\n")
        result = distill(recipe_from_reference(options), resume=True, progress=RichProgress(unit="steps"))
    except ChiasmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _say(
        *(f"note: {note}" for note in result.notes),
        f"Test accuracy (mean over classes): {result.metrics['balanced_accuracy']}",
        f"Test accuracy (plain):             {result.metrics['accuracy']}",
        f"mean over classes, frozen probe:   {result.unimodal['balanced_accuracy']}",
        f"predictions.csv and the model are in {result.folder}",
    )
    return 0


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
