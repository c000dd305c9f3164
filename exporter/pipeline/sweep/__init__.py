"""`depthcut sweep`: models x plans x precisions from one YAML, in one table."""

from exporter.models.loading.checked_folder import Dangers
from exporter.pipeline.sweep.reading import Sweep, read_sweep
from exporter.pipeline.sweep.run import Runner, look, run_sweep

__all__ = ["Dangers", "Runner", "Sweep", "look", "read_sweep", "run_sweep"]
