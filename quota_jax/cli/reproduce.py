"""``quota-jax reproduce``: the paper's tables and figures on a model of one's own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.reproduce.earlier import Earlier
    from quota_jax.reproduce.pareto import BenchFile
    from quota_jax.reproduce.study import Study
    from quota_jax.reproduce.tables import Plan, Table

FIGURES = {"fig3": ("llava",), "fig4": ("llava", "qwen2_5_vl"), "fig5": ("qwen2_5_vl",)}
"""Figures, and the model families that the paper or we draw them for."""
POOL = 384
"""Drawn samples from which each seed takes its own."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Make tables and figures of the paper, all methods run in this program.

    By default on a shipped small model and the drawn benchmarks, with their test questions. Work
    that was killed goes on with the same command; checkpoints and runs that several tables need are
    made once.

    For example:
      quota-jax reproduce table3 --model llava --out study
      quota-jax reproduce fig4 --variant co-calibrated --keep 0.1 --out study
      quota-jax bench --preset llava_1_5_7b --method flatquant --keep 1 0.3 0.1 --json bench.json
      quota-jax reproduce pareto --bench bench.json --out study
    """

    what: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TABLE")]
    """table1 to table7, scores, keep, methods, outliers, peers, fig3, fig4, fig5, or all; pareto:
    accuracy against speed and memory (with --bench, then also in all)."""
    out: Path
    """Folder of the study; tables come to OUT/tables."""
    model: Literal["llava", "qwen2_5_vl"] = "llava"
    """The shipped small model, where no --source is given."""
    source: Path | None = None
    """A full-precision checkpoint; needs --data and --samples."""
    data: Path | None = None
    """Folder with a folder for each task."""
    samples: Path | None = None
    """List of calibration samples, from which each seed draws --num-samples."""
    num_samples: int | None = None
    """Default 128."""
    seeds: tuple[int, ...] = (0,)
    """Of calibration."""
    steps: int | None = None
    """FlatQuant's steps for each block."""
    limit: int | None = None
    """Only the first questions of each task."""
    batch_size: int | None = None
    """Questions at a time; default 32."""
    visual_tokens: int | None = None
    """Of most pictures, for costs; default the model's reference picture."""
    max_new_tokens: int | None = None
    """A lower limit than the tasks' own."""
    text_bucket: int | None = None
    """Pad all prompts to this text length: one program for each run."""
    jobs: int = 1
    """Processes that share the work on this machine. Rows of table7 are measured one at a time,
    after all other work."""
    extend: Path | None = None
    """Folder with an earlier NAME.json of each table: rows that stand there are not run again but
    kept, and marked. What all rows are compared with is run again. Not for table7 and pareto."""
    bench: Path | None = None
    """pareto: the file that quota-jax bench --json wrote, of a preset of the same family."""
    variant: Literal[
        "prune-only",
        "quantize-then-prune",
        "prune-then-quantize",
        "collaborative",
        "co-calibrated",
    ] = "collaborative"
    """fig4: which variant's tokens are drawn."""
    keep: float = 0.3
    """fig4: fraction of the visual tokens that is left."""
    bits: str = "W4A4KV4"
    """fig4: precision, where the variant quantizes."""
    pictures: int = 4
    """fig4: questions whose pictures are drawn; the tasks take turns."""

    def run(self) -> int:
        from quota_jax.figures.canvas import check_plots
        from quota_jax.reproduce.earlier import rows_to_run
        from quota_jax.reproduce.tables import make_table
        from quota_jax.reproduce.work import begin_study, plan_of

        if not self.what:
            raise QuotaError("name a table or figure, for example table3, or all")
        if self.jobs < 1:
            raise QuotaError(f"--jobs must be at least 1, got {self.jobs}")
        if "pareto" in self.what and self.bench is None:
            raise QuotaError("pareto needs --bench, a file that quota-jax bench --json wrote")
        if {*FIGURES, "pareto", "all"} & set(self.what):
            check_plots()
        study = begin_study(self.out, self._settings())
        plan = plan_of(study, self.seeds)
        names = self._names(plan.config.model_type)
        bench = self._bench(plan)
        tables = [make_table(name, plan) for name in names if name not in FIGURES]
        # Nothing else may run on the device while power is measured.
        tables.sort(key=lambda table: table.rows[0].measured)
        found = [self._earlier(study, table) for table in tables]
        shared = [table.name for table in tables if not table.rows[0].measured]
        if shared:
            self._work(shared)
        for table, earlier in zip(tables, found, strict=True):
            study.run(rows_to_run(table, earlier))
            for file in self._write(study, table, bench):
                print(f"wrote {file}")
        for name in names:
            if name == "fig4":
                self._kept(study, plan)
            elif name in FIGURES:
                self._profile(study, name)
        return 0

    def _names(self, family: str) -> list[str]:
        """Tables and figures that are asked for."""
        from quota_jax.reproduce.tables import TABLES

        names = list(self.what)
        if names == ["all"]:
            names = [name for name in TABLES if name != "pareto" or self.bench is not None]
            names += [name for name, families in FIGURES.items() if family in families]
            if family == "qwen2_5_vl":
                names[names.index("table4")] = "table6"
        for name in names:
            if name in FIGURES and family not in FIGURES[name]:
                raise QuotaError(f"{name} is a figure of {FIGURES[name][0]}, not of {family}")
        return names

    def _earlier(self, study: Study, table: Table) -> Earlier | None:
        """What a table goes on from."""
        from quota_jax.reproduce.earlier import read_earlier

        if self.extend is None:
            return None
        if table.name == "pareto" or table.rows[0].measured:
            raise QuotaError(f"{table.name} is made whole: leave it out, or --extend")
        return read_earlier(self.extend / f"{table.name}.json", study, table)

    def _bench(self, plan: Plan) -> BenchFile | None:
        from quota_jax.reproduce.pareto import read_bench

        return None if self.bench is None else read_bench(self.bench, plan.config)

    def _settings(self) -> dict[str, object]:
        given = (self.source, self.data, self.samples)
        if any(given) and not all(given):
            raise QuotaError("--source, --data and --samples belong together")
        settings: dict[str, object] = {
            "source": self.source,
            "data": self.data,
            "samples": self.samples,
            "num_samples": self.num_samples,
            "steps": self.steps,
            "limit": self.limit,
            "batch_size": self.batch_size,
            "visual_tokens": self.visual_tokens,
            "max_new_tokens": self.max_new_tokens,
            "text_bucket": self.text_bucket,
        }
        return settings if all(given) else settings | self._testbed()

    def _testbed(self) -> dict[str, object]:
        """The shipped model, its benchmarks and samples, made where they are missing.

        Answers on the testbed are a few tokens long, and its prompts are short.
        """
        from converters import convert
        from quota_jax.testbed import small_llava_path, small_qwen_path
        from quota_jax.testbed.benchmarks.writer import write_benchmarks
        from quota_jax.testbed.samples import write_samples

        source, data = self.out / "source", self.out / "benchmarks"
        samples = self.out / "samples.json"
        folder, tokens = {
            "llava": (small_llava_path, None),
            "qwen2_5_vl": (small_qwen_path, 144),
        }[self.model]
        self.out.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            convert(folder(), source)
        write_benchmarks(data, split="test")
        if not samples.exists():
            write_samples(samples, POOL, family=self.model)
        return {
            "source": source,
            "data": data,
            "samples": samples,
            "visual_tokens": self.visual_tokens or tokens,
            "max_new_tokens": self.max_new_tokens or 32,
            "text_bucket": self.text_bucket or 96,
        }

    def _work(self, tables: list[str]) -> None:
        """Several processes, where they are asked for; what they leave is done here."""
        if self.jobs == 1:
            return
        command = [sys.executable, "-m", "quota_jax.reproduce.work", str(self.out), *tables]
        command += ["--seeds", *map(str, self.seeds)]
        if self.extend is not None:
            command += ["--extend", str(self.extend)]
        workers = [subprocess.Popen(command) for _ in range(self.jobs)]
        if any([worker.wait() for worker in workers]):
            raise QuotaError("a process of the study failed; its message is above")

    def _write(self, study: Study, table: Table, bench: BenchFile | None) -> tuple[Path, ...]:
        from quota_jax.reproduce.deployment_report import write_deployment
        from quota_jax.reproduce.paper import PAPER
        from quota_jax.reproduce.pareto import write_pareto
        from quota_jax.reproduce.report import write_table

        folder, provenance = self.out / "tables", self._provenance(study, table.name)
        if table.name == "pareto":
            assert bench is not None
            return write_pareto(study, table, bench, folder, provenance=provenance)
        paper = PAPER.get(table.name)
        lines = paper.markdown() if paper else ()
        if table.rows[0].measured:
            return write_deployment(study, table, folder, provenance=provenance, paper=lines)
        earlier = None if self.extend is None else self.extend / f"{table.name}.json"
        return write_table(
            study, table, folder, provenance=provenance, paper=lines, earlier=earlier
        )

    def _provenance(self, study: Study, what: str) -> dict[str, object]:
        import jax

        from quota_jax import __version__

        return {
            "command": self.command(what),
            "model": study.reference.config.model_type,
            "calibration samples": study.num_samples,
            "seeds": ", ".join(map(str, self.seeds)),
            "versions": f"quota_jax {__version__}, jax {jax.__version__}",
            "device": jax.devices()[0].device_kind,
        }

    def command(self, what: str) -> str:
        """The command that makes one table again."""
        parts = [f"quota-jax reproduce {what}", "--out OUT"]
        if self.source is None:
            parts.append(f"--model {self.model}")
        else:
            parts.append("--source CHECKPOINT --data DATA --samples SAMPLES")
        for name in ("num_samples", "steps", "limit", "max_new_tokens", "text_bucket"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"--{name.replace('_', '-')} {value}")
        if self.seeds != (0,):
            parts.append(f"--seeds {' '.join(map(str, self.seeds))}")
        if self.extend is not None and what not in FIGURES:
            parts.append("--extend EARLIER")
        if what == "pareto":
            parts.append("--bench BENCH")
        if what == "fig4":
            parts += [f"--{name} {value}" for name, value in self._drawn.items()]
        return " ".join(parts)

    @property
    def _drawn(self) -> dict[str, object]:
        """Options of fig4 that are not the default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in ("variant", "keep", "bits", "pictures")
            and getattr(self, field.name) != field.default
        }

    def _kept(self, study: Study, plan: Plan) -> None:
        """The tokens that a variant keeps (Fig. 4)."""
        from quota_jax.reproduce.kept_figure import draw_kept_tokens
        from quota_jax.reproduce.rows import variant_row

        row = variant_row(self.variant, plan.config, self.bits, keep=self.keep, seed=self.seeds[0])
        files = draw_kept_tokens(
            study,
            row,
            self.out / "tables",
            "_".join(["fig4", *map(str, self._drawn.values())]),
            count=self.pictures,
            provenance=self._provenance(study, "fig4"),
        )
        for file in files:
            print(f"wrote {file}")

    def _profile(self, study: Study, name: str) -> None:
        """Concentration and redundancy per layer, full precision and W4A4KV4 (Fig. 3 and 5)."""
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.checkpoint.format import encode_json, write_file
        from quota_jax.figures.profile_plot import draw_profile
        from quota_jax.prune.profile import ProfileOptions, measure_profile
        from quota_jax.reproduce.tables import flatquant

        folder = self.out / "tables"
        folder.mkdir(parents=True, exist_ok=True)
        quantized = open_checkpoint(study.checkpoint(flatquant("W4A4KV4", self.seeds[0])))
        profile = measure_profile(
            quantized,
            study.samples(self.seeds[0]),
            folder,
            reference=study.reference,
            options=ProfileOptions(dtype="float32"),
            progress=True,
        )
        draw_profile(profile, folder / f"{name}.png", quantized.quantization.label)
        content = encode_json(profile.to_json(), name)
        write_file(folder / f"{name}.json", content)
        print(f"wrote {folder / f'{name}.png'}\nwrote {folder / f'{name}.json'}")
