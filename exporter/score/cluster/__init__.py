"""Work spread over a Ray cluster, with results that equal a single process's."""
