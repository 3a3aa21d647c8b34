"""ModelOpt's automatic mode beside Lehr's budgeted search: 8-bit layers of digits-dit, their samples and their cost.

    PYTHONPATH=src MODELOPT_PYTHON benchmarks/modelopt_auto.py [MODEL] --bundle d.lehr [--bits 8,9,10] [--samples 64]
                                 [--resume]
    python benchmarks/modelopt_auto.py costs [MODEL] --bundle d.lehr [--budgets 35,45,50]

Writes benchmarks/results/modelopt_auto.json, first with a Python that has ModelOpt, then, with ``costs``, with Lehr's.
The bundle is ``lehr export MODEL``; that its step graph is cut out does not matter to the first command, which runs the
whole module in eager PyTorch with ModelOpt's emulated quantisers, and takes held-out seeds, the calibration data of
``lehr calibrate`` and the sampler from it. ModelOpt needs a Python of its own:
``python -m venv v && v/bin/pip install "nvidia-modelopt[onnx]==0.47.*" torch==2.13.0 requests huggingface_hub
safetensors``.

Quality is as in benchmarks/quantisation.py: PSNR of final samples beside float32 on the same noise, mean and worst,
and 10 log10(Σ ref² / Σ (ref - x)²) of the outputs over all evaluations of eight loops, at the reference's inputs.
"confirmed" is the mean PSNR on the fold of held-out seeds that Lehr confirms its choices on.

A layer's score in ``auto_quantize`` is a sum of squares of (gradient of the loss x what quantising changes), taken
where nothing is quantised. Of a squared error against the network's own float32 outputs that gradient is 0 there, and
so is every score; ModelOpt's documentation takes the score for the Fisher information of a log-likelihood. Here the
target is therefore the float32 output plus standard normal noise, a sample of a Gaussian around it: its squared error
is such a log-likelihood ("noisy"). "plain" is a search by the squared error without noise, for the record.

Searches take either every layer that ModelOpt quantises ("whole"), as it is documented, or those that a step graph has
("step"): what depends on timestep and class alone is disabled, and left out of the effective bits. Weights are counted
as 16 bits where nothing is quantised, so 8 bits are all of the layers and 16 none. The first search of each kind
calibrates and scores; those for other bits go on from its checkpoint, which gives the same result in less time.

``costs`` maps the layers to those of the step graph, charges each result by the static model of a CPU (multiplications
x rate + bytes of weights; attention's products, which neither side quantises here, are not counted), and searches for
each budget as ``lehr calibrate --budget "psnr>=N"`` does. What a budget buys is the cheapest result that keeps it on
both folds, for either side. ``--resume`` adds what an interrupted run of the same settings did not come to.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from environment import RESULTS, environment, write
from hoisted_precision import made
from torch import Tensor, nn

from lehr.calibration.budget import Measure, parse_budget
from lehr.calibration.cost_model import static_costs
from lehr.calibration.execute import step_graph
from lehr.calibration.held_out import Fold, HeldOut, Settings
from lehr.calibration.layers import layers
from lehr.calibration.problem import KEEP
from lehr.calibration.trajectories import collect
from lehr.export.eager import evaluate
from lehr.runtime.bundle import Bundle
from lehr.runtime.hoisted import HoistedNetwork
from lehr.runtime.spec import ModelSpec

Array = npt.NDArray[Any]
Batch = dict[str, Tensor]
Searched = tuple[nn.Module, dict[str, Any]]  # a quantised module, and what the search says of it
NAME = "modelopt_auto"
FORMATS = ("INT8_SMOOTHQUANT_CFG", "INT8_DEFAULT_CFG")
NOISY, PLAIN = "noisy", "plain"  # losses
BITS = "8,8.1,8.5,9,10,11,12,13,14"
ROWS = 32  # of a batch of calibration data
TARGET = "target"  # the entry of a batch that the loss compares with

# ---------------------------------------------------------------------------------------------------- the network


class Whole(HeldOut):
    """Measures whole networks in place of step graphs: nothing is computed before the loop."""

    def _network(self) -> HoistedNetwork | None:
        return None


class Module:
    """A PyTorch module as a session."""

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        self._module, self._spec = module, spec

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return evaluate(self._module, self._spec, feeds)


def sqnr_db(held_out: HeldOut, session: Module) -> dict[str, float]:
    """As in benchmarks/quantisation.py, which needs packages that ModelOpt's Python lacks."""
    signal, noise = [], []
    for call in held_out.track.calls:
        error = session.run(call.feeds)[held_out.output].astype(np.float64) - call.output
        signal.append(float((call.output.astype(np.float64) ** 2).sum()))
        noise.append(float((error**2).sum()))
    each = 10 * np.log10(np.array(signal) / np.array(noise))
    return {"whole": float(10 * np.log10(sum(signal) / sum(noise))), "worst": float(each.min())}


def calibration_batches(bundle: Bundle, folder: Path) -> list[Batch]:
    """The inputs that ``lehr calibrate`` draws by default, in batches of one timestep each."""
    spec = bundle.manifest.model
    rows: dict[int, list[dict[str, Array]]] = {}
    for evaluation in collect(bundle, folder=folder).evaluations():
        count = len(evaluation.sample)
        feeds = {
            spec.sample.name: evaluation.sample,
            spec.timestep.name: np.full(count, evaluation.timestep, spec.timestep.dtype.numpy),
        }
        rows.setdefault(evaluation.index, []).append({**feeds, **evaluation.conditions})
    batches: list[Batch] = []
    for parts in rows.values():
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        count = len(whole[spec.sample.name])
        batches += [
            {name: torch.from_numpy(value[first : first + ROWS]) for name, value in whole.items()}
            for first in range(0, count, ROWS)
        ]
    return batches


def inputs(batch: Batch) -> Batch:
    """What the network is given of a batch."""
    return {name: value for name, value in batch.items() if name != TARGET}


def with_targets(module: nn.Module, batches: Iterable[Batch], *, noise: bool) -> list[Batch]:
    """Batches with the float32 outputs, or samples of a Gaussian of variance 1 around them."""
    generator, targeted = torch.Generator().manual_seed(0), []
    for batch in batches:
        with torch.no_grad():
            output = module(**batch)
        drawn = torch.randn(output.shape, generator=generator) if noise else torch.zeros_like(output)
        targeted.append({**batch, TARGET: output + drawn})
    return targeted


def conditioning(module: nn.Module, bundle: Bundle) -> list[str]:
    """Layers with weights that the step graph does not have."""
    kept = {layer.group for layer in layers(step_graph(bundle), sample=bundle.manifest.model.sample.name)}
    products = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, part in module.named_modules() if isinstance(part, products) and name not in kept]


# ------------------------------------------------------------------------------------------------------- ModelOpt


def quantised_layers(module: nn.Module) -> list[str]:
    """Layers whose weights and inputs are both quantised."""
    found: list[str] = []
    part: Any
    for name, part in module.named_modules():
        if hasattr(part, "weight_quantizer") and part.weight_quantizer.is_enabled and part.input_quantizer.is_enabled:
            found.append(name)
    return found


def uniform(module: nn.Module, *, form: str, batches: list[Batch]) -> Searched:
    """Every layer in one format."""
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]

    def loop(model: nn.Module) -> None:
        for batch in batches:
            model(**inputs(batch))

    return mtq.quantize(module, getattr(mtq, form), loop), {}


def automatic(
    module: nn.Module, *, form: str, batches: list[Batch], bits: float, disabled: list[str], state: Path
) -> Searched:
    """A search, and what it says of itself; what it measured is kept in the file ``state`` for the next one."""
    import modelopt.torch.quantization as mtq

    def squared_error(output: Tensor, batch: Batch) -> Tensor:
        return ((output - batch[TARGET]) ** 2).sum() / 2

    constraints: dict[str, Any] = {"effective_bits": bits}
    if disabled:
        constraints["cost"] = {"excluded_module_name_patterns": disabled}
    quantised, found = mtq.auto_quantize(
        module,
        constraints=constraints,
        quantization_formats=[getattr(mtq, form)],
        data_loader=batches,
        forward_step=lambda model, batch: model(**inputs(batch)),
        loss_func=squared_error,
        disabled_layers=disabled or None,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        checkpoint=str(state),
    )
    # A candidate's scores are in the order of its formats, the one without quantisation last.
    scores = {name.removesuffix(".quant_recipe"): s["scores"][0] for name, s in found["candidate_stats"].items()}
    reached = found["best"]["constraints"]["effective_bits"]
    return quantised, {"satisfied": found["best"]["is_satisfied"], "bits_reached": reached, "scores": scores}


def measured(name: str, judges: Mapping[str, Whole], search: Callable[[nn.Module], Searched]) -> dict[str, Any]:
    """One result: its layers, its quality and the seconds it took."""
    module, spec, _ = made(name)
    started = time.monotonic()
    quantised, said = search(module)
    seconds = time.monotonic() - started
    session = Module(quantised, spec)
    select = judges["select"]
    quality = {"sqnr_db": sqnr_db(select, session), **select.measure(session).summary()}
    confirmed = judges["confirm"].measure(session).mean(Measure.PSNR)
    return {
        "seconds": round(seconds, 1),
        "layers": quantised_layers(quantised),
        **said,
        **quality,
        "confirmed": confirmed,
    }


def results(
    name: str, bundle: Bundle, bits: list[float], samples: int, known: list[dict[str, Any]], scratch: Path
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """A row for each uniform format and each search that is not among the known ones, with the layers' scores."""
    module, spec, _ = made(name)
    settings, reference = Settings(num=samples), Module(module, spec)
    judges = {
        "select": Whole(bundle, settings, reference=reference),
        "confirm": Whole(bundle, replace(settings, fold=Fold.CONFIRM), reference=reference),
    }
    drawn = calibration_batches(bundle, scratch)
    data = {loss: with_targets(module, drawn, noise=loss == NOISY) for loss in (NOISY, PLAIN)}
    spaces: dict[str, list[str]] = {"step": conditioning(module, bundle), "whole": []}
    wishes: list[tuple[dict[str, Any], Callable[[nn.Module], Searched]]] = [
        ({"format": form, "search": None}, partial(uniform, form=form, batches=drawn)) for form in FORMATS
    ]
    wishes += searches(FORMATS[0], "step", PLAIN, bits[-1:], data[PLAIN], spaces["step"], scratch)
    for space, disabled in spaces.items():
        for form in FORMATS:
            wishes += searches(form, space, NOISY, bits, data[NOISY], disabled, scratch)
    for about, search in wishes:
        if any(about.items() <= row.items() for row in known):
            continue
        row = {**about, **measured(name, judges, search)}
        psnr = f"{row['psnr']['mean']:.1f}, worst {row['psnr']['worst']:.1f}, confirmed {row['confirmed']:.1f} dB"
        print(f"{about}: {len(row['layers'])} layers, {psnr}, {row['seconds']} s", file=sys.stderr)
        scores = row.pop("scores", {})
        yield row, scores


def searches(
    form: str, space: str, loss: str, bits: list[float], batches: list[Batch], disabled: list[str], scratch: Path
) -> list[tuple[dict[str, Any], Callable[[nn.Module], Searched]]]:
    """Searches for some effective bits that share what the first of them measures."""
    state = scratch / f"{form}-{space}-{loss}.pt"
    return [
        (
            {"format": form, "search": space, "loss": loss, "bits": limit},
            partial(automatic, form=form, batches=batches, bits=limit, disabled=disabled, state=state),
        )
        for limit in bits
    ]


# ---------------------------------------------------------------------------------------------------------- costs


def charged(rows: list[dict[str, Any]], bundle: Bundle) -> tuple[list[dict[str, Any]], float]:
    """Rows with shares of float32's multiplications and cost, and that cost."""
    from lehr.calibration.options import options_of

    model = bundle.manifest.model
    found = layers(step_graph(bundle), model.default_sizes(batch=2), sample=model.sample.name)
    choices = options_of(found, ("int8",))
    costs = static_costs(found, choices)
    able = [layer for layer in found if layer.name in choices]
    full = costs.of(dict.fromkeys(choices, KEEP))
    told = []
    for row in rows:
        plan = {layer.name: "int8" if layer.group in row["layers"] else KEEP for layer in able}
        macs = sum(layer.macs for layer in able if plan[layer.name] != KEEP) / sum(layer.macs for layer in able)
        told.append({**row, "macs_in_int8": round(macs, 4), "cost": round(costs.of(plan) / full, 4)})
    return told, full


def searched(bundle: Bundle, limit: float, scratch: Path) -> dict[str, Any]:
    """What Lehr finds for a budget on the mean PSNR, however long it takes."""
    from lehr.calibration.budgeted import Wish, calibrate_to_budget, histogram, report

    started = time.process_time()
    wish = Wish(budget=parse_budget(f"psnr>={limit:g}"), folder=scratch, time_limit=None)
    found = calibrate_to_budget(bundle, wish, progress=lambda text: print(text, file=sys.stderr))
    told = report(found)
    chosen, full = found.found.chosen, found.found.full_cost
    return {
        **{key: told[key] for key in ("budget", "met", "finished", "seconds", "full_cost", "confirmed", "measured")},
        "cpu_seconds": round(time.process_time() - started, 1),
        "uniform": _point(told["best_uniform"], full),
        "chosen": _point(told["chosen"], full),
        "plan": {} if chosen is None else dict(chosen.plan),
        "options": {} if chosen is None else histogram(chosen.plan),
    }


def _point(told: dict[str, Any] | None, full: float) -> dict[str, Any] | None:
    """A measured plan in short, its cost as a share of float32's."""
    if told is None:
        return None
    return {**{key: value for key, value in told.items() if key != "plan"}, "cost": round(told["cost"] / full, 4)}


def bought(rows: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """The cheapest row that keeps a budget on both folds; the better one of two that cost the same."""
    kept = [row for row in rows if min(row["psnr"]["mean"], row["confirmed"]) >= limit]
    best = min(kept, key=lambda row: (row["cost"], -row["psnr"]["mean"]), default=None)
    return None if best is None else {key: value for key, value in best.items() if key != "layers"}


def compare(known: dict[str, Any], bundle: Bundle, limits: list[float]) -> Iterator[dict[str, Any]]:
    """A model's record with costs, and what each budget buys on either side, after every budget."""
    rows, full = charged(known["rows"], bundle)
    budgets: list[dict[str, Any]] = []
    for limit in limits:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "copy.lehr")
            shutil.copytree(bundle.root, copy)
            ours = searched(Bundle.open(copy), limit, Path(scratch))
        if round(ours["full_cost"]) != round(full):
            raise RuntimeError(f"the search counts {ours['full_cost']:g} for float32, this file {full:g}.")
        budgets.append({"psnr": limit, "modelopt": bought(rows, limit), "lehr": ours})
        print(json.dumps(budgets[-1], indent=1), file=sys.stderr)
        yield {**known, "rows": rows, "full_cost": full, "budgets": budgets, "costs_environment": environment()}


# ----------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Measure a model with ModelOpt, or charge what was measured; other models' records are kept."""
    costs = sys.argv[1:2] == ["costs"]
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="digits-dit")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--bits", default=BITS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--budgets", default="35,45,50")
    given = parser.parse_args(sys.argv[2:] if costs else sys.argv[1:])
    stored = RESULTS / f"{NAME}.json"
    record = json.loads(stored.read_text()) if stored.is_file() else {"models": {}}
    models, bundle = dict(record["models"]), Bundle.open(given.bundle)
    if costs:
        limits = [float(limit) for limit in given.budgets.split(",")]
        for compared in compare(models[given.model], bundle, limits):
            models[given.model] = compared
            write(NAME, {**record, "models": models})  # the machine and versions of the first command stay
        return
    import modelopt

    warnings.filterwarnings("ignore", module="modelopt")
    bits = [float(value) for value in given.bits.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        about = {"modelopt": modelopt.__version__, "samples": given.samples}
        before = models.get(given.model, {}) if given.resume else {}
        if before and {key: before[key] for key in about} != about:
            parser.error(f"the record is of other settings, {before['modelopt']} and {before['samples']} samples.")
        rows: list[dict[str, Any]] = list(before.get("rows", ()))
        scores: dict[str, dict[str, float]] = dict(before.get("scores", {}))
        for row, scored in results(given.model, bundle, bits, given.samples, list(rows), Path(scratch)):
            rows.append(row)
            if scored:
                scores[f"{row['format']} {row['search']} {row['loss']}"] = scored
            models[given.model] = {**about, "rows": rows, "scores": scores}
            write(NAME, {"models": models})  # what is there when it is interrupted can be charged


if __name__ == "__main__":
    main()
