"""The same run on a Dask cluster: ``python examples/cluster.py SLIDE [MODEL]`` (needs the extra ``distributed``).

Here the workers are two processes of this machine; with ``Client("tcp://scheduler:8786")`` they may be anywhere that
sees the slide under the same path. They score blocks; this process alone writes. Map and annotations are the same,
bit for bit, as those of a run on threads.
"""

import sys

from distributed import Client, LocalCluster

import wsiengine


def main(slide: str, model: str) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        result = wsiengine.infer(slide, model, output="out", client=client)
    print(result.summary)


if __name__ == "__main__":  # workers import this file: nothing may start when they do
    main(*[*sys.argv[1:], "crc5"][:2])
