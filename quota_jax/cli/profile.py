"""``quota-jax profile``: where visual tokens can be dropped, seen on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, table
from quota_jax.cli.derive import read_some
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.prune.profile import Profile

RESULT, PICTURE = "profile.json", "profile.png"


@dataclass(frozen=True, kw_only=True)
class ShowProfile:
    """Measure attention concentration and redundancy of visual tokens per decoder layer.

    Proposes candidate layers for a recipe: early ones whose attention already singles tokens out,
    and whose tokens are still diverse. With --reference in full precision beside the quantized
    model. Writes profile.json and profile.png. A run that was killed is taken up again by the same
    command.

    For example:
      quota-jax profile llava-7b-w4a4 --data calib.json --reference llava-7b --out llava-profile
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    data: Path
    """A JSON list of {"image": path, "text": prompt}, paths relative to the file."""
    out: Path
    """Folder to write; must not hold a finished profile."""
    reference: Path | None = None
    """The full-precision checkpoint that a quantized one was calibrated from."""
    samples: int | None = None
    """How many of the list, from its start; default 128 or as many as there are."""
    batch_size: int = 4
    """Samples that are computed together."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Compute in this dtype; None takes the stored one."""
    seed: int = 0
    """Draws the tokens that are compared, where a picture has more than 1024."""
    no_plot: bool = False
    """Draw no profile.png, which needs matplotlib."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.checkpoint.format import encode_json, write_file
        from quota_jax.figures.canvas import check_plots
        from quota_jax.prune.profile import ProfileOptions, measure_profile

        if not self.no_plot:
            check_plots()
        checkpoint = open_checkpoint(self.checkpoint)
        reference = None if self.reference is None else open_checkpoint(self.reference)
        samples = read_some(self.data, self.samples)
        options = ProfileOptions(batch_size=self.batch_size, dtype=self.dtype, seed=self.seed)
        if (self.out / RESULT).exists():
            raise QuotaError(f"{self.out / RESULT} exists: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        profile = measure_profile(
            checkpoint,
            samples,
            self.out,
            reference=reference,
            options=options,
            progress=True,
        )
        print(profile_table(profile))
        if not self.no_plot:
            from quota_jax.figures.profile_plot import draw_profile

            draw_profile(profile, self.out / PICTURE, checkpoint.quantization.label)
            print(f"wrote {self.out / PICTURE}")
        write_file(self.out / RESULT, encode_json(profile.to_json(), RESULT))
        print(f"wrote {self.out / RESULT}")
        return 0


def profile_table(profile: Profile) -> str:
    """Medians over samples per layer, and the proposal."""
    header, columns = ["layer"], []
    for name, series in profile.series.items():
        short = name.replace("_", " ")
        for metric in ("concentration", "redundancy"):
            header.append(f"{metric}, {short}")
            columns.append(getattr(series, metric).median)
    rows: list[Sequence[object]] = [
        (layer, *(f"{value:.4f}" for value in values))
        for layer, values in enumerate(zip(*columns, strict=True))
    ]
    found = profile.candidates
    layers = " ".join(map(str, found.layers))
    how = "no run of layers meets the rule; these are the most concentrated early ones"
    if found.rule_met:
        how = f"concentration at least {found.threshold:.4f}"
        how += "" if found.limit is None else f", redundancy at most {found.limit:.4f}"
    return f"{table(tuple(header), rows)}\n\ncandidates: --layers {layers} ({how})"
