"""``quota-jax verify``: is a checkpoint whole, and does it equal its source."""

from __future__ import annotations

from dataclasses import dataclass

from quota_jax.cli.console import CheckpointPath, converters, progress


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every file of a checkpoint, and with --against compare it with its source.

    Tensors are compared bit for bit; logits too, with transformers, where torch is installed. Exit
    status 1 if a check fails.

    For example:
      quota-jax verify llava-7b --against llava-hf/llava-1.5-7b-hf
    """

    checkpoint: CheckpointPath
    """Checkpoint to check."""
    against: str | None = None
    """Hugging Face folder or hub id it was converted from."""

    def run(self) -> int:
        with progress("verifying") as step:
            report = converters().verify(self.checkpoint, against=self.against, progress=step)
        print(report)
        return 0 if report.ok else 1
