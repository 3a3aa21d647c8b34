"""Quantised step graphs beside those of other tools: output SQNR, final samples, and time on the same engine library.

    python benchmarks/quantisation.py [MODEL ...] [--bundles FOLDER] [--samples 64] [--nncf FOLDER]
                                      [--modelopt PYTHON] [--accuracy-control] [--budgets 35,45] [--only RECIPE,...]

Writes benchmarks/results/quantisation.json and docs/quantisation-samples-MODEL.png. MODEL is digits-dit or digits-adm;
each is exported (or taken from ``FOLDER/MODEL.lehr``) into a scratch folder and calibrated there. Peers get the same
step graph and the same calibration inputs. Every graph runs inside the same loops: final samples of 20 steps on
held-out seeds against the float32 graph on the same noise. Output SQNR is 10 log10(Σ ref² / Σ (ref - x)²) over all
evaluations of eight such loops, at the reference's inputs. Times are medians of evaluations at batch 2 that take turns,
by library; eager PyTorch computes the conditioning at every step, which the step graphs have been relieved of.

``--only`` measures the quality of some recipes anew, and leaves every other figure of the model as it was;
``--budgets ""`` leaves its searches.

A peer that is not installed is written down as missing, with what to install. ``--nncf`` names a folder that NNCF was
installed into (``pip install --target``), ``--modelopt`` a Python that has ModelOpt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from environment import RESULTS, write
from quantised_peers import modelopt, nncf, nncf_accuracy_control, ort_dynamic, ort_static

from lehr.calibration.budget import Measure, parse_budget
from lehr.calibration.budgeted import Wish, calibrate_to_budget, report, saved
from lehr.calibration.calibrate import Data, gather, provenance, store
from lehr.calibration.execute import Session, inlined, step_graph
from lehr.calibration.held_out import HeldOut, Settings
from lehr.calibration.layers import layers
from lehr.calibration.observers import observe
from lehr.calibration.recipes import needs_grams, plan_of
from lehr.calibration.timing import by_onnxruntime, by_openvino, few_rows, interleaved
from lehr.calibration.tracks import only
from lehr.calibration.trajectories import collect
from lehr.engines.portable import portable_denoiser
from lehr.runtime.bundle import Bundle
from lehr.runtime.errors import LehrError, RunFailed
from lehr.runtime.picture import grid, save_png, to_bytes
from lehr.runtime.recipe import recipe
from lehr.runtime.timing import write_inputs

Array = npt.NDArray[Any]
NAME = "quantisation"
PICTURE = Path(__file__).parents[1] / "docs" / "quantisation-samples.png"
MODELS = ("digits-dit", "digits-adm")
RECIPES = ("int8", "int8-sq", "int8-asym", "int8-asym-attention", "int8-attention", "int8-weight", "int4-weight", "fp8")
TIMED = RECIPES[:-2]  # the others have no kernels on this machine
SHOWN = 10  # samples of each row of the picture
EXACT_DB = 60.0  # what accuracy control is told that the float graph reaches; infinity is no number for it


# ------------------------------------------------------------------------------------------------------- graphs


def calibration_feeds(bundle: Bundle, folder: Path) -> list[dict[str, Array]]:
    """Inputs of the step graph along the loops that calibration draws."""
    taken: list[dict[str, Array]] = []
    output = bundle.manifest.graphs["step"].signature.outputs[0].name

    class Keeping:
        def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            taken.append({name: np.array(value) for name, value in feeds.items()})
            return {output: np.zeros_like(feeds["sample"])}

    denoiser = portable_denoiser(bundle, Keeping)
    for evaluation in collect(bundle, folder=folder, num=16).evaluations():
        denoiser.with_variance(evaluation.sample, evaluation.timestep, evaluation.conditions)
    return taken


def loaded(path: Path) -> Callable[[], ir.Model]:
    """Reads a graph anew each time, since libraries change it."""
    return lambda: ir.load(path)


def graph_session(library: str, make: Callable[[], ir.Model]) -> Session:
    """A graph in an engine library, as it runs it fastest."""
    return {"onnxruntime": by_onnxruntime, "openvino": by_openvino}[library](make(), 0)


def file_session(library: str, path: Path) -> Session:
    """A peer's file in the library that it was made for, without changes of ours."""
    if library == "openvino":
        import openvino as ov

        from lehr.runtime.backends.openvino import DEVICE, OpenVinoSession, configuration

        settings = configuration({"precision": "f32", "threads": 0})
        return OpenVinoSession(ov.Core().compile_model(ov.Core().read_model(path), DEVICE, settings))
    import onnxruntime as ort

    from lehr.runtime.backends.onnxruntime import PROVIDER, OnnxRuntimeSession, session_options

    options = session_options({"intra_op_threads": 0, "spinning": False})
    return OnnxRuntimeSession(ort.InferenceSession(path, options, providers=[PROVIDER]))


def opened(library: str, path: Path) -> Session | str:
    """A peer's file, or why its own library refuses it."""
    try:
        return file_session(library, path)
    except Exception as e:  # noqa: BLE001 — whatever the library says is the result
        return f"{library} refuses its file: {str(e).splitlines()[0].replace(str(path), path.name)}"


class Eager:
    """PyTorch's own evaluation of the whole network, for its time."""

    def __init__(self, model: str, timestep: float, labels: Array) -> None:
        from safetensors.torch import load_file

        from lehr.export.backbones import preset
        from lehr.export.eager import eager
        from lehr.export.source import shipped_weights

        chosen = preset(model)
        module = chosen.module().eval()
        module.load_state_dict(load_file(str(shipped_weights(model))))
        self._denoiser, self._timestep, self._labels = eager(module, chosen.spec), timestep, labels

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        conditions = {"class_labels": self._labels[: len(feeds["sample"])]}
        return {"output": self._denoiser(feeds["sample"], self._timestep, conditions)}


# ----------------------------------------------------------------------------------------------------- measuring


def sqnr_db(held_out: HeldOut, session: Session) -> dict[str, float]:
    """Of outputs at the reference's inputs, over all evaluations and of the worst one."""
    signal, noise = [], []
    for call in held_out.track.calls:
        error = only(session.run(call.feeds)).astype(np.float64) - call.output
        signal.append(float((call.output.astype(np.float64) ** 2).sum()))
        noise.append(float((error**2).sum()))
    with np.errstate(divide="ignore"):
        each = 10 * np.log10(np.array(signal) / np.array(noise))
        return {"whole": float(10 * np.log10(sum(signal) / sum(noise))), "worst": float(each.min())}


def peer_files(
    graph: Path, feeds: Sequence[Mapping[str, Array]], folder: Path, arguments: argparse.Namespace, held_out: HeldOut
) -> tuple[dict[str, tuple[str, Path]], dict[str, str]]:
    """Peer -> library and file, and the peers that are missing with the reason."""
    inputs = []
    for number, row in enumerate(feeds):
        inputs.append(folder / f"feeds-{number:04d}.npz")
        write_inputs(inputs[-1], row)
    transformer = "dit" in held_out.spec.name

    def psnr(compiled: Any) -> float:
        from lehr.runtime.backends.openvino import OpenVinoSession

        few = Settings(num=8, steps=held_out.settings.steps, batch=8, seed=1)
        judge = psnr_judges.setdefault("few", HeldOut(held_out.bundle, few))
        return min(EXACT_DB, judge.measure(OpenVinoSession(compiled)).mean(Measure.PSNR))

    psnr_judges: dict[str, HeldOut] = {}
    makers: dict[str, tuple[str, Path, Callable[[Path], Any]]] = {
        "ort-dynamic": ("onnxruntime", folder / "dynamic.onnx", lambda path: ort_dynamic(graph, path, inputs)),
        "ort-static": ("onnxruntime", folder / "static.onnx", lambda path: ort_static(graph, path, inputs)),
        "nncf": ("openvino", folder / "nncf.xml", lambda path: nncf(graph, path, inputs)),
        "modelopt": (
            "onnxruntime",
            folder / "modelopt.onnx",
            lambda path: modelopt(graph, path, inputs, python=arguments.modelopt),
        ),
    }
    if arguments.accuracy_control:
        makers["nncf-accuracy-control"] = (
            "openvino",
            folder / "nncf-accuracy.xml",
            lambda path: nncf_accuracy_control(
                graph, path, inputs, transformer=transformer, psnr=psnr, budget=arguments.budgets[0], exact=EXACT_DB
            ),
        )
    made: dict[str, tuple[str, Path]] = {}
    missing: dict[str, str] = {}
    for name, (library, path, make) in makers.items():
        started = time.monotonic()
        try:
            make(path)
        except Exception as e:  # noqa: BLE001 — whatever another tool raises is its result
            missing[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        else:
            made[name] = (library, path)
        print(f"{name}: {time.monotonic() - started:.0f} s {missing.get(name, '')}", file=sys.stderr)
    return made, missing


def opened_bundle(model: str, scratch: Path, bundles: Path | None) -> Bundle:
    """The model's bundle in the scratch folder, exported or copied."""
    root = scratch / f"{model}.lehr"
    if bundles is None:
        subprocess.run([sys.executable, "-m", "lehr", "export", model, "-o", str(root)], check=True)
    else:
        shutil.copytree(bundles / f"{model}.lehr", root)
    return Bundle.open(root)


def calibrated(bundle: Bundle, names: Sequence[str]) -> None:
    """Calibrate for several recipes with one look at the data."""
    found = layers(step_graph(bundle), sample=bundle.manifest.model.sample.name)
    plans = {name: plan_of(name, found) for name in names}
    grams = sorted({layer for plan in plans.values() for layer in needs_grams(plan)})
    trajectories = gather(bundle, Data())
    statistics = observe(bundle, trajectories, grams=grams)
    for name, plan in plans.items():
        store(bundle, recipe(name), plan, statistics, provenance=provenance(trajectories))


def anew(model: str, scratch: Path, arguments: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """A model's row with some recipes measured again."""
    bundle = opened_bundle(model, scratch, arguments.bundles)
    held_out = HeldOut(bundle, Settings(num=known["samples"]))
    rows = dict(known["rows"])
    calibrated(bundle, arguments.only)
    for name in arguments.only:
        found = _quality(held_out, ir.load(bundle.path(f"calibration/{name}/step.onnx")))
        rows[name] = {**found, "version": recipe(name).version}
    return {**known, "rows": rows}


def measure(model: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's row."""
    bundle = opened_bundle(model, scratch, arguments.bundles)
    held_out = HeldOut(bundle, Settings(num=arguments.samples))
    graphs: dict[str, Callable[[], ir.Model]] = {"fp32": lambda: step_graph(bundle)}
    calibrated(bundle, RECIPES)
    for name in RECIPES:
        graphs[name] = loaded(bundle.path(f"calibration/{name}/step.onnx"))
    feeds = calibration_feeds(bundle, scratch / "trajectories")
    whole = scratch / "step.onnx"  # weights inside: peers refuse or lose external ones
    whole.write_bytes(ir.to_proto(inlined(step_graph(bundle))).SerializeToString())
    peers, missing = peer_files(whole, feeds, scratch, arguments, held_out)
    rows: dict[str, Any] = {}
    sessions: dict[str, dict[str, Session]] = {"onnxruntime": {}, "openvino": {}}
    for name in ("fp32", *TIMED):
        for library, known in sessions.items():
            known[name] = graph_session(library, graphs[name])
    for name, (library, path) in list(peers.items()):
        session = opened(library, path)
        if isinstance(session, str):
            missing[name] = session
            del peers[name]
        else:
            sessions[library][name] = session
    for name in RECIPES:
        rows[name] = _quality(held_out, graphs[name]())
    for name, (library, _) in peers.items():
        rows[name] = _quality(held_out, sessions[library][name])
    call = held_out.track.calls[0]
    few = few_rows(call.feeds, len(call.sample))
    labels = np.arange(2, dtype=np.int64)
    times = {}
    for library, known in sessions.items():
        timed: dict[str, Session] = {**known, "eager": Eager(model, call.timestep, labels)}
        times[library] = interleaved(timed, dict.fromkeys(timed, few))
    budgets = [_budget(bundle, limit, scratch) for limit in arguments.budgets]
    _draw(model, held_out, graphs)
    return {
        "model": model,
        "samples": arguments.samples,
        "steps": held_out.settings.steps,
        "rows": rows,
        "milliseconds": times,
        "missing": missing,
        "budgets": budgets,
    }


def _quality(held_out: HeldOut, graph: ir.Model | Session) -> dict[str, Any]:
    from lehr.calibration.execute import OrtGraph

    try:
        session = OrtGraph(graph) if isinstance(graph, ir.Model) else graph
        found = {"sqnr_db": sqnr_db(held_out, session), **held_out.measure(session, scored=True).summary()}
    except (LehrError, RunFailed) as e:
        return {"failed": str(e)}
    print(json.dumps(found), file=sys.stderr)
    return found


def _budget(bundle: Bundle, limit: float, scratch: Path) -> dict[str, Any]:
    wish = Wish(budget=parse_budget(f"psnr>={limit:g}"), folder=scratch)
    started = time.process_time()
    made = calibrate_to_budget(bundle, wish, progress=lambda text: print(text, file=sys.stderr))
    told = report(made)
    kept = ("budget", "met", "finished", "seconds", "confirmed", "milliseconds", "measured", "full_cost")
    plan = {} if made.found.chosen is None else dict(made.found.chosen.plan)
    return {
        **{key: told[key] for key in kept},
        "cpu_seconds": round(time.process_time() - started, 1),
        "cost": None if made.found.chosen is None else made.found.chosen.cost / made.found.full_cost,
        "uniform": None if made.found.best_uniform is None else made.found.best_uniform.name,
        "uniform_cost": None
        if made.found.best_uniform is None
        else made.found.best_uniform.cost / made.found.full_cost,
        "saved": saved(made.found),
        "layers": {option: list(plan.values()).count(option) for option in dict.fromkeys(plan.values())},
    }


def _draw(model: str, held_out: HeldOut, graphs: Mapping[str, Callable[[], ir.Model]]) -> None:
    """float32 above each recipe, the same seeds across."""
    from lehr.calibration.execute import OrtGraph

    rows = [held_out.draw(OrtGraph(make()), range(SHOWN)) for make in graphs.values()]
    pictures = to_bytes(np.concatenate(rows), held_out.spec.value_range)
    save_png(PICTURE.with_name(f"{PICTURE.stem}-{model}.png"), grid(pictures, columns=SHOWN, zoom=2))


def limits(text: str) -> list[float]:
    """Numbers with commas between them, or none."""
    return [float(word) for word in text.split(",") if word]


def main() -> None:
    """Measure what is named on the command line, all by default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--nncf", type=Path)
    parser.add_argument("--modelopt", type=Path)
    parser.add_argument("--accuracy-control", action="store_true")
    parser.add_argument("--budgets", type=limits, default=[35.0, 50.0])
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if arguments.accuracy_control and not arguments.budgets:
        parser.error("--accuracy-control keeps the first of --budgets; give one")
    if arguments.nncf is not None:
        sys.path.append(str(arguments.nncf))
    stored = RESULTS / f"{NAME}.json"
    known = {row["model"]: row for row in json.loads(stored.read_text())["models"]} if stored.is_file() else {}
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            if arguments.only:
                known[model] = anew(model, Path(scratch), arguments, known[model])
            else:
                searched = known.get(model, {}).get("budgets", [])
                known[model] = measure(model, Path(scratch), arguments)
                if not arguments.budgets:
                    known[model]["budgets"] = searched
        write(NAME, {"models": [known[name] for name in MODELS if name in known]})


if __name__ == "__main__":
    main()
