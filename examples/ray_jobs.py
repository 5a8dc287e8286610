"""A list of clips on the GPUs of a Ray cluster: one actor a GPU, each with its own models.

    pip install ray && python examples/ray_jobs.py list.csv          # list: video,audio,output
    python examples/ray_jobs.py list.csv --gpus 0 --actors 2         # no GPU: two actors on the CPU

Paths must be the same on all machines, such as on a shared disk. What exists is skipped, so the
same command goes on where it was.
"""

import argparse
from pathlib import Path

import ray
from ray.util import ActorPool

from lsync_compile.jobs import JobOutcome, ListedJob, SyncSettings, do_job, read_jobs


class Actor:
    def __init__(self, settings: SyncSettings) -> None:
        self.sync = settings.load()  # Ray shows each actor its own GPU alone

    def do(self, job: ListedJob) -> JobOutcome:
        return do_job(job, self.sync, device=ray.get_runtime_context().get_node_id()[:8])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gpus", type=float, default=1, help="for each actor")
    parser.add_argument("--actors", type=int, help="all GPUs of the cluster by default")
    arguments = parser.parse_args()
    ray.init()
    settings = SyncSettings(
        checkpoint=arguments.checkpoint, arguments={"num_inference_steps": arguments.steps}
    )
    # An actor that dies is started again and its clip is tried once more.
    remote = ray.remote(num_gpus=arguments.gpus, max_restarts=3, max_task_retries=1)(Actor)
    count = arguments.actors or int(ray.cluster_resources().get("GPU", 0) // arguments.gpus)
    pool = ActorPool([remote.remote(settings) for _ in range(count)])
    for outcome in pool.map_unordered(
        lambda actor, job: actor.do.remote(job), read_jobs(arguments.list)
    ):
        print(outcome)


if __name__ == "__main__":
    main()
