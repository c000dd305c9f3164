"""Work spread over a Ray cluster, with results that equal a single process's.

Importing this costs neither Ray nor PyTorch.
"""

from exporter.score.cluster.meter import ClusterMeter, cluster_meter
from exporter.score.cluster.pool import Pool, WorkerGroup, open_pool
from exporter.score.cluster.scoring import score_on_cluster

__all__ = ["ClusterMeter", "Pool", "WorkerGroup", "cluster_meter", "open_pool", "score_on_cluster"]
