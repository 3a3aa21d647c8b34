"""L3: many samples, judged as a distribution.

The same seeds are drawn twice through the real pipeline, by the engine and by the bundle's portable graph in fp32,
whose own parity with eager is proven first, on the recorded loops. Distances lie in the feature space of a network;
what they may be is measured against two independent halves of the reference, which is what the draw alone does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lehr.ci.checks import Check, DistributionSeries, Outcome, judged
from lehr.ci.policy import DistributionLimits
from lehr.runtime.arrays import read_arrays
from lehr.runtime.bundle import Bundle
from lehr.runtime.denoiser import Denoiser
from lehr.runtime.distribution import (
    Estimate,
    cosine_similarity,
    frechet_distance,
    kernel_distance,
    mean_interval,
    paired_frechet,
)
from lehr.runtime.errors import BundleError, InvalidInput, MissingExtra, RunFailed
from lehr.runtime.golden import Golden
from lehr.runtime.parity import compare
from lehr.runtime.pipeline import Pipeline, Request
from lehr.runtime.stored_tables import StoredTables
from lehr.runtime.verify import psnr_limit, replay

if TYPE_CHECKING:
    from lehr.engines.feature_network import ImageNetwork, TextNetwork

Array = npt.NDArray[Any]

SEED = 77_000  # away from golden data's and from those that people choose
BATCH = 25
SHOWN = 10  # samples of each kind in a report
_FOLDER = Path(__file__).parent / "features"
# Source of a bundle -> feature network that comes with Lehr; another model of that size may draw something else.
_SHIPPED = {"digits-dit": "digits-classifier.onnx", "digits-adm": "digits-classifier.onnx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """What the user named; None for what was not.

    Attributes:
        features: ONNX file, pictures to features (:mod:`lehr.engines.feature_network`).
        text_features: ONNX file, conditions to features of the same space.
        statistics: .npz with ``mu`` (D,) and ``sigma`` (D, D) of real pictures' features, for absolute windows.
        prompts: .npz with the model's conditions by name, one row a sample, and ``unconditional.NAME``.
    """

    features: Path | None = None
    text_features: Path | None = None
    statistics: Path | None = None
    prompts: Path | None = None


def network_file(bundle: Bundle, given: Networks) -> Path | None:
    """The feature network for a bundle: the one named, else one that comes with Lehr for this very model."""
    if given.features is not None:
        return given.features
    name = _SHIPPED.get(bundle.manifest.source)
    return None if name is None else _FOLDER / name


def judgeable(bundle: Bundle, given: Networks) -> str | None:
    """Why L3 cannot be judged here, or None if it can."""
    if network_file(bundle, given) is None:
        return "no feature network is known for this model: name one, --features FILE.onnx"
    try:
        _engines()
    except MissingExtra as e:
        return str(e)
    files = {name for graph in bundle.manifest.graphs.values() for name in (graph.file, graph.weights) if name}
    if absent := sorted(files - set(bundle.manifest.files)):
        return f"this copy of the bundle has no {absent[0]}, and the reference is drawn from the portable graphs"
    return None


def distribution(
    bundle: Bundle, denoiser: Denoiser, golden: Golden, limits: DistributionLimits, given: Networks
) -> tuple[list[Check], DistributionSeries | None]:
    """Checks of L3.

    Raises:
        InvalidInput: a network or prompts that cannot be used.
        BundleError: the portable graphs are not there.
    """
    image_network, text_network, portable = _engines()
    file = network_file(bundle, given)
    if file is None:
        raise InvalidInput("L3 needs a feature network: name an ONNX file, --features FILE.onnx.")
    network = image_network(file)
    text = None if given.text_features is None else text_network(given.text_features)
    reference = portable(bundle)
    trusted = _reference(reference, golden)
    if trusted.outcome is Outcome.FAILED:
        return [trusted], None
    request = drawing(bundle, golden, int(limits.samples), given.prompts)
    spec = bundle.manifest.model
    try:
        drawn = [Pipeline(one, tables=StoredTables(bundle))(request) for one in (denoiser, reference)]
    except RunFailed as e:
        return [trusted, judged("L3.draws", False, str(e))], None
    engine, expected = (network(samples, spec.value_range) for samples in drawn)
    noise, checks = _distances(engine.vectors, expected.vectors, limits)
    checks = [trusted, *checks]
    if text is not None:
        asked = text(asked_for(request, range(request.count)))
        similar = [cosine_similarity(found.vectors, asked) for found in (expected, engine)]
        checks.append(_drop("L3.similarity", "text-image similarity", similar[0], similar[1], limits))
    if engine.classes is not None and expected.classes is not None and request.class_labels:
        labels = np.resize(np.asarray(request.class_labels), len(engine.classes))
        hits = [(found == labels).astype(np.float64) for found in (expected.classes, engine.classes)]
        checks.append(_drop("L3.agreement", f"classes as {network.name} sees them", hits[0], hits[1], limits))
    series = DistributionSeries(
        network=network.name,
        sha256=network.sha256,
        samples=request.count,
        noise=noise,
        reference=drawn[1][:SHOWN],
        engine=drawn[0][:SHOWN],
    )
    return checks, series


# --------------------------------------------------------------------------------------------------------- drawing


def drawing(bundle: Bundle, golden: Golden, num: int, prompts: Path | None) -> Request:
    """What to draw: classes in turn, the user's prompts, or the recorded conditions in turn, unguided.

    Raises:
        InvalidInput: prompts that do not fit the model.
    """
    spec = bundle.manifest.model
    names = [tensor.name for tensor in spec.conditions]
    request = Request(num=num, seed=SEED, batch=BATCH)
    if prompts is not None:
        arrays = _prompts(prompts)
        chosen = {name: arrays[name] for name in names if name in arrays}
        if set(chosen) != set(names) or not names:
            raise InvalidInput(f"{prompts} holds {sorted(arrays)}, expected the model's conditions {names}.")
        without = {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith("unconditional.")}
        batched = {tensor.name for tensor in spec.conditions if tensor.batched}
        rows = {name: np.resize(v, (num, *v.shape[1:])) if name in batched else v for name, v in chosen.items()}
        scale = None if without else 1.0
        other = {name: np.resize(v, (num, *v.shape[1:])) for name, v in without.items()}
        return replace(request, conditions=rows, unconditional=other, guidance_scale=scale)
    if not names:
        return request
    if names == ["class_labels"] and spec.num_classes is not None:
        return replace(request, class_labels=tuple(range(spec.num_classes)))
    known = golden.steps.conditions
    rows = {
        tensor.name: np.resize(known[tensor.name], (num, *known[tensor.name].shape[1:]))
        if tensor.batched
        else known[tensor.name]
        for tensor in spec.conditions
    }
    return replace(request, conditions=rows, guidance_scale=1.0)


def asked_for(request: Request, numbers: range) -> dict[str, Array]:
    """What the samples ``numbers`` of a request were asked to be, by the names of the model's conditions."""
    if request.class_labels:
        labels = [request.class_labels[k % len(request.class_labels)] for k in numbers]
        return {"class_labels": np.asarray(labels, dtype=np.int64)}
    return {name: value[numbers.start : numbers.stop] for name, value in request.conditions.items()}


def _prompts(file: Path) -> Mapping[str, Array]:
    try:
        return read_arrays(file)
    except (BundleError, OSError) as e:
        raise InvalidInput(f"cannot read the prompts {file}: {e}") from e


def _reference(denoiser: Denoiser, golden: Golden) -> Check:
    """The portable graph draws what eager drew: without recorded loops, its single evaluations must do."""
    if not golden.trajectories:
        reason = "no loops are recorded, so the reference is the portable graph as the exporter checked it"
        return Check(name="L3.reference", outcome=Outcome.NOTED, reason=reason)
    found = min(
        compare(loop.final, replay(denoiser, loop)[0], denoiser.spec.value_range).psnr_db
        for loop in golden.trajectories[-1:]
    )
    limit = psnr_limit(golden, "fp32")
    reason = f"the portable graph draws eager's recorded loop with {found:.1f} dB, at least {limit:.1f} dB"
    if found < limit:
        reason += ": it is no reference, and the bundle's graphs or weights are damaged"
    return judged("L3.reference", found >= limit, reason, value=found, limit=limit)


# --------------------------------------------------------------------------------------------------------- judging


def _distances(engine: Array, reference: Array, limits: DistributionLimits) -> tuple[float, list[Check]]:
    half = len(reference) // 2
    # The distance of two finite sets falls at best as 1 / N, so half of what halves show is no more than what sets of
    # the whole size would: the limit errs to the strict side.
    noise = frechet_distance(reference[:half], reference[half : 2 * half]) / 2
    spread = kernel_distance(reference[:half], reference[half : 2 * half], limits.confidence)
    chance = (spread.high - spread.low) / 2
    frechet = paired_frechet(engine, reference, limits.confidence)
    kernel = kernel_distance(engine, reference, limits.confidence)
    n = len(engine)
    return noise, [
        _bounded(
            "L3.frechet", frechet, limits.frechet_ratio * noise, f"two reference draws of {n} differ by {noise:.3g}"
        ),
        _bounded("L3.kernel", kernel, limits.kernel_ratio * chance, f"chance alone moves it by {chance:.3g}"),
    ]


def _bounded(name: str, found: Estimate, limit: float, scale: str) -> Check:
    reason = f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}], must lie below {limit:.3g} ({scale})"
    return judged(name, found.high <= limit, reason, value=found.high, limit=limit)


def _drop(name: str, words: str, reference: Array, engine: Array, limits: DistributionLimits) -> Check:
    """How much less the engine's samples are what was asked for than the reference's, pair by pair."""
    found = mean_interval(reference - engine, limits.confidence)
    reason = (
        f"{words}: {float(engine.mean()):.3f} beside the reference's {float(reference.mean()):.3f}, "
        f"drop {found.value:.3g} [{found.low:.3g}, {found.high:.3g}], at most {limits.agreement_drop:g}"
    )
    return judged(name, found.high <= limits.agreement_drop, reason, value=found.high, limit=limits.agreement_drop)


def _engines() -> tuple[type[ImageNetwork], type[TextNetwork], Any]:
    from lehr.engines.feature_network import ImageNetwork, TextNetwork
    from lehr.engines.portable import portable_denoiser
    from lehr.runtime.backends import backend

    backend("onnxruntime").version()  # raises MissingExtra
    return ImageNetwork, TextNetwork, portable_denoiser
