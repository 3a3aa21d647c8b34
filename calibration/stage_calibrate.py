"""``lehr calibrate --stage``: from a recipe's name to the quantised graph of a text encoder, a decoder, an encoder.

A stage goes the denoiser's way (:mod:`lehr.calibration.calibrate`) with data of its own: it runs once a picture, so
there are no timesteps and every evaluation counts alike. Everything lands in ``stages/<name>/calibration/<recipe>/``,
and the same bundle, data and settings give the same bytes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lehr.calibration.calibrate import Calibration, OnStep, weight_bytes_of, write_quantised
from lehr.calibration.observed import Statistics
from lehr.calibration.observers import MEMORY, Gatherer, Observer, digest_of
from lehr.calibration.quantize import quantize
from lehr.calibration.recipes import needs_grams, renamed, resting_in
from lehr.calibration.rewrite import Rewrite
from lehr.calibration.stage_feeds import StageData, StageFeeds, gather_feeds
from lehr.calibration.stage_layers import stage_layers, stage_plan
from lehr.calibration.stage_tables import quantise_tables
from lehr.engines.graph.weights import weight_bytes
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import BundleError
from lehr.runtime.recipe import Format, recipe
from lehr.runtime.stage import StageKind

_TABLES = frozenset({Format.INT8, Format.INT4})  # recipes whose tables are stored in 8 bits: those of integer weights


def calibrate_stage(
    bundle: Bundle,
    stage: str,
    name: str,
    *,
    data: StageData | None = None,
    rest: Format | None = None,
    stored_as: str | None = None,
    on_step: OnStep | None = None,
) -> Calibration:
    """Calibrate a stage for a shipped recipe.

    Args:
        bundle: holds weights.
        stage: its name.
        name: of the recipe.
        data: where calibration data comes from.
        rest: arithmetic of what is not quantised; by default the recipe's own.
        stored_as: another name for the result, for a variation of a recipe beside the recipe itself.
        on_step: told how far it is.

    Raises:
        UnknownName: no such stage, or no such recipe.
        InvalidInput: a recipe that needs no calibration or that the stage cannot take, data that does not fit, or a
            name that is taken.
        BundleError: structure only, or damaged files.
        RunFailed: the float32 graph fails, or is not finite.
    """
    data = data or StageData()
    entry = bundle.manifest.stage(stage)
    model = stage_graph(bundle, stage)
    found = stage_layers(model, entry.spec)
    plan = stage_plan(name, found, stage)
    chosen = recipe(name) if rest is None else resting_in(recipe(name), rest)
    if stored_as is not None:
        chosen = renamed(chosen, stored_as)
    drawn = None if on_step is None else lambda done, total: on_step("drawing, picture", done, total)
    feeds = gather_feeds(bundle, stage, data, drawn)
    statistics = observe_stage(bundle, stage, model, feeds, grams=needs_grams(plan), data=data, on_step=on_step)
    portable = weight_bytes(model)
    quantize(model, plan, statistics)
    tables = {}
    if entry.spec.kind is StageKind.TEXT_ENCODER and chosen.weights in _TABLES:
        tables = quantise_tables(Rewrite(model=model, statistics=statistics))
    more = {
        "data": {
            "source": feeds.source,
            "samples": feeds.rows,
            "evaluations": len(feeds.batches),
            "conditions": feeds.conditions,
            "digest": feeds.digest,
        },
        "statistics": statistics.digest,
        "tables": tables,
    }
    files = write_quantised(bundle, chosen, model, plan, entry.graph, more=more, stage=stage)
    return Calibration(
        recipe=chosen,
        plan=plan,
        layers=len(found),
        weight_bytes=weight_bytes_of(bundle, files),
        portable_bytes=portable,
        files=files,
        digest=statistics.digest,
    )


def stage_graph(bundle: Bundle, stage: str) -> ir.Model:
    """A stage's portable graph, its weights' hash checked.

    Raises:
        UnknownName: no such stage.
        BundleError: structure only, or damaged files.
    """
    entry = bundle.manifest.stage(stage).graph
    if entry.weights is None:
        raise BundleError(f"{bundle.root.name} holds structure only, no weights. Export it without --structure-only.")
    bundle.path(entry.weights)
    return ir.load(bundle.path(entry.file))


def observe_stage(
    bundle: Bundle,
    stage: str,
    model: ir.Model,
    feeds: StageFeeds,
    *,
    grams: tuple[str, ...] = (),
    data: StageData,
    on_step: OnStep | None = None,
) -> Statistics:
    """Run a stage's portable graph over calibration data and gather what its layers read.

    Raises:
        RunFailed: a tensor is not finite; or ONNX Runtime fails.
    """
    entry = bundle.manifest.stage(stage)
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    gatherer = Gatherer(model, stage_layers(model, entry.spec), grams, np.ones(1))
    sizes = entry.spec.default_sizes(**entry.spec.check_feeds(feeds.batches[0]))
    folder = bundle.path(entry.graph.file).parent
    observer = Observer(text, folder, gatherer.wanted, sizes, MEMORY, data.threads)
    for number, batch in enumerate(feeds.batches):
        observer.take = gatherer.taking(0, f"in stage {stage!r}")
        observer.run(batch)
        if on_step is not None:
            on_step("observing, evaluation", number + 1, len(feeds.batches))
    return gatherer.result(
        timesteps=np.zeros((1, 2)),
        evaluations=len(feeds.batches),
        samples=feeds.rows,
        digest=digest_of(feeds.digest, text),
    )
