"""What ``lehr run`` does with a denoiser alone: conditions from a file, and samples that are films or 3-D objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy.typing as npt

    from lehr.runtime.bundle import Bundle
    from lehr.runtime.manifest import Manifest
    from lehr.runtime.spec import ModelSpec

    Array = npt.NDArray[Any]

WITHOUT = "unconditional."  # before the name of a condition that guidance subtracts
VIEWS, TURN = 6, 24  # around the object, in a picture and in an animation


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Conditions by name, a row a sample, and how many samples they are for; None where nothing says."""

    conditions: Mapping[str, Array]
    unconditional: Mapping[str, Array]
    num: int | None


def read_conditions(path: Path | None, spec: ModelSpec, num: int | None) -> Given:
    """The arrays of a .npz file by the names of the network's inputs; one row stands for all samples.

    Raises:
        InvalidInput: no such file, a name that is no input of the network, or rows that are not as many as others.
    """
    import numpy as np

    from lehr.runtime.arrays import read_arrays
    from lehr.runtime.errors import BundleError, InvalidInput, UnknownName

    if path is None:
        return Given(conditions={}, unconditional={}, num=num)
    try:
        arrays = read_arrays(path)
    except (BundleError, OSError) as e:
        raise InvalidInput(f"cannot read {path}: {e}") from e
    known = {tensor.name: tensor for tensor in spec.conditions}
    found: dict[str, Array] = {}
    for key, array in arrays.items():
        name = key.removeprefix(WITHOUT)
        if name not in known:
            raise UnknownName("condition", name, known)
        tensor = known[name]
        if len(array.shape) != len(tensor.shape):
            raise InvalidInput(f"{path.name} holds {key!r} of shape {array.shape}, expected {tensor.shape}.")
        found[key] = array.astype(tensor.dtype.numpy)
    rows = {key: len(array) for key, array in found.items() if known[key.removeprefix(WITHOUT)].batched}
    count = num or max(rows.values(), default=1)
    if wrong := {key: many for key, many in rows.items() if many not in (1, count)}:
        key = next(iter(wrong))
        raise InvalidInput(f"{path.name} holds {wrong[key]} rows of {key!r} for {count} samples; give one row, or all.")
    whole = {
        key: np.repeat(array, count, axis=0) if rows.get(key) == 1 and count > 1 else array
        for key, array in found.items()
    }
    return Given(
        conditions={key: array for key, array in whole.items() if not key.startswith(WITHOUT)},
        unconditional={key.removeprefix(WITHOUT): array for key, array in whole.items() if key.startswith(WITHOUT)},
        num=count,
    )


class Shots:
    """What of a sample is shown: itself, its frames, or views of it. None of them is drawn for a .npz file.

    Args:
        bundle: of the denoiser.
        output: the file.
        views: as they are written on the command line.
        stage_recipes: likewise.
        target: class of machine.
        recipe: of the denoiser.

    Raises:
        UsageError: views of samples that are no 3-D objects.
        InvalidInput: samples that no picture can be made of.
    """

    def __init__(
        self,
        bundle: Bundle,
        output: Path,
        *,
        views: Sequence[str],
        stage_recipes: tuple[str, ...],
        target: str,
        recipe: str,
    ) -> None:
        from lehr.commands._pictures import recipes_by_stage
        from lehr.runtime import picture
        from lehr.runtime.stages import DENOISER, Stages
        from lehr.runtime.views import View, around

        self._output, self._spec = output, bundle.manifest.model
        self._renderer = renderer_of(bundle.manifest)
        self._frames = picture.frame_axis(self._spec.sample.shape)
        if self._renderer is None:
            if views:
                raise click.UsageError(f"--view looks at 3-D samples, and {self._spec.name} draws none.")
            shape = self._spec.sample_shape(1)
            if not self._raw:
                picture.check_channels(_one_picture(shape, self._frames))
            return
        asked = tuple(View.parse(text) for text in views)
        self._views = asked or around(VIEWS if output.suffix.lower() == ".png" else TURN)
        recipes = {DENOISER: recipe, **recipes_by_stage(stage_recipes)}
        self._stages = Stages(bundle, target=target, recipes=recipes)
        if not self._raw:
            with self._stages.using(self._renderer):  # what is missing is said before the work
                pass

    @property
    def _raw(self) -> bool:
        return self._output.suffix.lower() == ".npz"

    def save(self, samples: Array, *, fps: float | None) -> None:
        """Write the file.

        Args:
            samples: of the denoiser.
            fps: pictures a second of an animation; by default 8 for frames and views, 2 for a picture a sample.
        """
        from lehr.runtime.views import draw_views

        value_range = self._spec.value_range
        if self._raw:
            shots = samples
        elif self._renderer is not None:
            with self._stages.using(self._renderer) as renderer:
                shots, value_range = draw_views(renderer, samples, self._views), (-1.0, 1.0)
        else:
            shots = samples[:, None] if self._frames is None else _moved(samples, self._frames)
        write(self._output, samples, shots, value_range, fps=fps)


def write(output: Path, samples: Array, shots: Array, value_range: tuple[float, float], *, fps: float | None) -> None:
    """Write samples to a .npz, or what is shown of them to a picture or an animation.

    Args:
        output: the file.
        samples: as the array of a .npz file.
        shots: (N, K, C, H, W), K frames or views of each sample.
        value_range: of the shots.
        fps: see :meth:`Shots.save`.
    """
    from lehr.runtime import picture

    kind = output.suffix.lower()
    if kind == ".npz":
        picture.save_npz(output, samples)
        return
    still = shots.shape[1] == 1
    if kind == ".png":
        picture.save_png(
            output,
            picture.grid(picture.to_bytes(shots[:, 0], value_range)) if still else picture.sheet(shots, value_range),
        )
        return
    film = picture.to_bytes(shots[:, 0], value_range) if still else picture.film(shots, value_range)
    picture.save_animation(output, film, milliseconds=round(1000 / (fps or (2.0 if still else 8.0))))


def renderer_of(manifest: Manifest) -> str | None:
    """The stage of a bundle that draws its samples from viewpoints."""
    from lehr.runtime.views import renders

    return next((name for name, entry in manifest.stages.items() if renders(entry.spec)), None)


def _one_picture(shape: tuple[int, ...], frames: int | None) -> tuple[int, ...]:
    """A sample's shape without its frames."""
    return tuple(size for axis, size in enumerate(shape) if axis != frames)


def _moved(samples: Array, frames: int) -> Array:
    """Frames behind the samples: (N, K, C, H, W)."""
    import numpy as np

    return np.moveaxis(samples, frames, 1)
