"""The benchmarks, one module each: how its files are read, how it asks and how it is scored.

Local files are the official ones. Folders of parquet files as the hub has them (owners lmms-lab and
lmms-lab-encoder) are read through `datasets`, the extra ``eval``. Prompts and greedy generation
settings are those of lmms-eval 0.7.3; with prompts="llava" those of LLaVA's own evaluation.

A limit keeps what is scored together: MME's two questions about a picture, MMBench's rotations. It
takes turns between POPE's splits and between MME's categories, and the first questions elsewhere.
"""

from quota_jax.evaluate.task import Task
from quota_jax.evaluate.tasks import gqa, mmbench, mme, pope, scienceqa, seedbench, textvqa

__all__ = ["TASKS"]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (pope, gqa, mme, mmbench, seedbench, scienceqa, textvqa)
}
