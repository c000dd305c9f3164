"""What healing can't do, said before minutes go into its texts."""

from __future__ import annotations

from exporter.artifacts import ModelRef, PruningPlan
from exporter.artifacts.servers import is_plain, places_of, refuse_needed
from exporter.errors import HealingError
from exporter.heal.distill.student import adapter_library
from exporter.heal.options import HealOptions
from exporter.models.anatomy.architectures import named_sublayers
from exporter.models.changed_weights import refuse_quantized
from exporter.models.loading.model_source import LoadedModel
from graph_passes.types import SublayerRef


def healed_sublayers(plan: PruningPlan, model: ModelRef) -> list[SublayerRef]:
    """The sublayers whose places are taken.

    Raises:
        HealingError: The model is an encoder-decoder, whose texts are pairs.
        PlanError: The model has no such sublayers.
    """
    if model.encoder_layers is not None:
        raise HealingError(
            f"{model.source} is an encoder-decoder, which is healed where it is exported.",
            "depthcut export MODEL --plan PLAN --heal best --calibration PAIRS.",
            code="two-stacks",
        )
    return named_sublayers(plan.deletions, model.num_layers)


def refuse_early(options: HealOptions, loaded: LoadedModel, plan: PruningPlan) -> None:
    """Refuses what can't be done.

    Raises:
        PlanError: The runtime that the plan is for needs a sublayer of it.
        HealingError: The rank is none of this model's, its weights are quantised, or the runtime
            holds nothing of what is to be fitted.
        MissingDependencyError: A training wants adapters, and peft is not installed or too old.
    """
    _refuse_rank(options.rank, loaded)
    _refuse_server(options, plan)
    if options.changes_weights:
        refuse_quantized(loaded.model)
    if options.trains and options.train == "adapters":
        adapter_library()


def _refuse_server(options: HealOptions, plan: PruningPlan) -> None:
    """Refuses a plan that its runtime can't hold, and healing that finds no place there."""
    server = options.server
    if server is None or is_plain(plan.deletions):
        return
    refs = [ref for each in plan.deletions for ref in each.sublayers]
    refuse_needed(server, refs)
    wanted = {"bias", "linear"} if options.kind == "best" else {options.kind}
    held = {place for ref in refs for place in places_of(server, ref)}
    if not options.changes_weights and not wanted & held:
        raise HealingError(
            f"{server} has no place for what --heal {options.kind} fits: there the dropped "
            f"sublayers of this plan can have {' or '.join(sorted(held))}.",
            "Give --heal fold or distill, which change kept weights, or leave the plan as it is.",
            code="server-holds-none",
        )


def _refuse_rank(rank: int | None, loaded: LoadedModel) -> None:
    width = loaded.model.config.get_text_config().hidden_size
    if rank is not None and not 1 <= rank <= width:
        raise HealingError(
            f"There is no map of rank {rank} here.",
            f"Ask for a rank from 1 to {width}.",
            code="rank-out-of-range",
        )
